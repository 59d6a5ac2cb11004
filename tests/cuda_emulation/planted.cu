// Small correct kernels, and the same with one bug each, to test the checkers. A bug is a template
// argument: one compilation holds all.
#include <stdint.h>

#include "cuda_runtime.h"

enum Bug : int {
  kNone,
  kMissingBarrier,
  kMissingSecondBarrier,
  kMissingMask,
  kOffByOne,
  kWrongShuffleMask,
  kWrongShuffleOffset,
  kShuffleFromOutside,
  kShuffleInBranch,
  kDivergentBarrier,
  kTwoBarriers,
  kEarlyReturn,
  kShortShared,
  kUnwrittenShared,
  kMissingSyncwarp,
  kPlainAdd,
  kMissingFence,
  kMisaligned,
  kMuchShared,
  kManyThreads,
  kBugs
};

struct Arrays {
  const float* in;
  float* out;
  int* counts;
  int rows, columns;
};

// ---- sums: shuffles, then shared memory
// ----------------------------------------------------------

template <Bug kBug>
__device__ float warp_sum(float value) {
  const unsigned mask = kBug == kWrongShuffleMask ? 0x7fffffffu : 0xffffffffu;
  if (kBug == kShuffleFromOutside) {
    const bool low = threadIdx.x % 32 < 16;
    return low ? value + __shfl_down_sync(0x0000ffffu, value, 16) : value;
  }
  if (kBug == kShuffleInBranch && threadIdx.x % 32 == 31) return value;
  const int last = kBug == kWrongShuffleOffset ? 2 : 1;
  for (int offset = 16; offset >= last; offset /= 2) {
    value += __shfl_xor_sync(mask, value, offset);
  }
  return value;
}

template <Bug kBug>
__global__ void sum_rows(Arrays a) {
  constexpr int kWarps = 4;
  WCMI_SHARED(float, partial, kBug == kShortShared ? kWarps - 1 : kWarps);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const float* row = a.in + static_cast<int64_t>(blockIdx.x) * a.columns;
  float total = 0;
  for (int pass = 1; pass <= 2; ++pass) {
    float sum = 0;
    const int end = a.columns + (kBug == kOffByOne ? 1 : 0);
    for (int i = static_cast<int>(threadIdx.x); i < end; i += static_cast<int>(blockDim.x)) {
      sum += static_cast<float>(pass) * row[i];
    }
    if (kBug == kEarlyReturn && static_cast<int>(threadIdx.x) >= a.columns) return;
    sum = warp_sum<kBug>(sum);
    if (threadIdx.x % 32 == 0 && !(kBug == kUnwrittenShared && warp == 3)) partial[warp] = sum;
    if (kBug == kTwoBarriers && warp == 0) {
      __syncthreads();
    } else if (kBug != kMissingBarrier && !(kBug == kDivergentBarrier && warp == 3)) {
      __syncthreads();
    }
    total += partial[0] + partial[1] + partial[2] + partial[3];
    if (kBug != kMissingSecondBarrier) __syncthreads();
  }
  if (threadIdx.x == 0) a.out[blockIdx.x] = total;
}

// ---- a transposed tile in shared memory, with a boundary mask
// ------------------------------------

template <Bug kBug>
__global__ void transpose(Arrays a) {
  constexpr int kTile = 16, kStride = kTile + 1;
  WCMI_SHARED(float, tile, kBug == kShortShared ? kTile * kTile : kTile * kStride);
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int column = static_cast<int>(blockIdx.x) * kTile + x;
  const int row = static_cast<int>(blockIdx.y) * kTile + y;
  const int limit = a.columns + (kBug == kOffByOne ? 1 : 0);
  if (kBug == kMissingMask || (row < a.rows && column < limit)) {
    tile[y * kStride + x] = a.in[row * a.columns + column];
  }
  if (kBug != kMissingBarrier) __syncthreads();
  const int to_row = static_cast<int>(blockIdx.x) * kTile + y;
  const int to_column = static_cast<int>(blockIdx.y) * kTile + x;
  if (to_row < limit && to_column < a.rows) {
    a.out[to_row * a.rows + to_column] = tile[x * kStride + y];
  }
}

// ---- a histogram: of a block in shared memory, of all in global memory
// ----------------------------

constexpr int kBins = 8;

template <Bug kBug>
__device__ void add(int* to, int value) {
  if (kBug == kPlainAdd) {
    *to += value;
  } else {
    atomicAdd(to, value);
  }
}

template <Bug kBug>
__global__ void histogram_of_blocks(Arrays a) {
  WCMI_DYNAMIC_SHARED(int, bins);
  if (threadIdx.x < kBins) bins[threadIdx.x] = 0;
  if (kBug != kMissingBarrier) __syncthreads();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < a.rows * a.columns) atomicAdd(&bins[static_cast<int>(a.in[i] * kBins)], 1);
  __syncthreads();
  if (threadIdx.x < kBins) add<kBug>(&a.counts[threadIdx.x], bins[threadIdx.x]);
  // Orders nothing between blocks, so no race with another either.
  __syncthreads();
}

template <Bug kBug>
__global__ void histogram_of_threads(Arrays a) {
  WCMI_SHARED(int, bins, kBins);
  if (threadIdx.x < kBins) bins[threadIdx.x] = 0;
  __syncthreads();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < a.rows * a.columns) add<kBug>(&bins[static_cast<int>(a.in[i] * kBins)], 1);
  __syncthreads();
  if (threadIdx.x < kBins) atomicAdd(&a.counts[threadIdx.x], bins[threadIdx.x]);
}

// ---- a warp that works through shared memory
// -----------------------------------------------------

template <Bug kBug>
__global__ void reverse_in_warps(Arrays a) {
  WCMI_SHARED(float, values, 64);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int i = static_cast<int>(blockIdx.x) * 64 + thread;
  if (i < a.rows * a.columns) values[thread] = a.in[i];
  if (kBug != kMissingSyncwarp) __syncwarp();
  const float reversed = values[thread - lane + 31 - lane];
  if (i < a.rows * a.columns) a.out[i] = reversed;
}

// ---- a sum over blocks that the last of them finishes
// --------------------------------------------

template <Bug kBug>
__global__ void sum_by_last_block(Arrays a) {
  float* const partial = a.out + 1;
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < a.columns; ++i) sum += a.in[blockIdx.x * a.columns + i];
    partial[blockIdx.x] = sum;
    if (kBug != kMissingFence) __threadfence();
    if (atomicAdd(&a.counts[0], 1) == static_cast<int>(gridDim.x) - 1) {
      if (kBug != kMissingFence) __threadfence();
      float total = 0;
      for (unsigned block = 0; block < gridDim.x; ++block) total += partial[block];
      a.out[0] = total;
    }
  }
}

// ---- 16 bytes at a time
// --------------------------------------------------------------------------

template <Bug kBug>
__global__ void copy_by_four(Arrays a) {
  const int shift = kBug == kMisaligned ? 1 : 0;
  const int i = 4 * static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) + shift;
  if (i + 4 <= a.rows * a.columns) {
    *reinterpret_cast<float4*>(a.out + i) = *reinterpret_cast<const float4*>(a.in + i);
  }
}

// ---- by number
// -----------------------------------------------------------------------------------

enum Kernel : int { kSum, kTranspose, kBlocks, kThreads, kReverse, kLast, kCopy };

template <Bug kBug>
void run(int kernel, const Arrays& a) {
  const unsigned rows = static_cast<unsigned>(a.rows), columns = static_cast<unsigned>(a.columns);
  const unsigned count = rows * columns;
  switch (kernel) {
    case kSum:
      WCMI_LAUNCH(sum_rows<kBug>, rows, kBug == kManyThreads ? 1056 : 128,
                  kBug == kMuchShared ? 48 * 1024 : 0, nullptr, a);
      break;
    case kTranspose:
      WCMI_LAUNCH(transpose<kBug>, dim3((columns + 15) / 16, (rows + 15) / 16), dim3(16, 16), 0,
                  nullptr, a);
      break;
    case kBlocks:
      WCMI_LAUNCH(histogram_of_blocks<kBug>, (count + 63) / 64, 64,
                  (kBug == kShortShared ? kBins - 1 : kBins) * sizeof(int), nullptr, a);
      break;
    case kThreads:
      WCMI_LAUNCH(histogram_of_threads<kBug>, (count + 63) / 64, 64, 0, nullptr, a);
      break;
    case kReverse:
      WCMI_LAUNCH(reverse_in_warps<kBug>, (count + 63) / 64, 64, 0, nullptr, a);
      break;
    case kLast:
      WCMI_LAUNCH(sum_by_last_block<kBug>, rows, 32, 0, nullptr, a);
      break;
    case kCopy:
      WCMI_LAUNCH(copy_by_four<kBug>, (count / 4 + 63) / 64, 64, 0, nullptr, a);
      break;
  }
}

template <int kBug>
void run_with_bug(int bug, int kernel, const Arrays& a) {
  if constexpr (kBug < kBugs) {
    if (bug == kBug) return run<static_cast<Bug>(kBug)>(kernel, a);
    run_with_bug<kBug + 1>(bug, kernel, a);
  }
}

extern "C" __attribute__((visibility("default"))) void planted(int kernel, int bug, const float* in,
                                                               float* out, int* counts, int rows,
                                                               int columns) {
  run_with_bug<0>(bug, kernel, {in, out, counts, rows, columns});
  cudaGetLastError();
}
