// Kernels that show what single operations of the emulation do.
#include <stdint.h>

#include "cuda_runtime.h"

#define WCMI_TEST extern "C" __attribute__((visibility("default"))) int

// ---- warps --------------------------------------------------------------------------------------

enum Shuffle : int { kDirect, kUp, kDown, kXor };

__global__ void shuffle_kernel(int kind, unsigned mask, int argument, int width, int64_t* out) {
  const int thread = static_cast<int>(threadIdx.x);
  if ((mask >> (thread % 32) & 1) == 0) return;
  const int64_t own = (int64_t{1} << 40) + thread;
  const unsigned delta = static_cast<unsigned>(argument);
  switch (kind) {
    case kDirect:
      out[thread] = __shfl_sync(mask, own, argument, width);
      break;
    case kUp:
      out[thread] = __shfl_up_sync(mask, own, delta, width);
      break;
    case kDown:
      out[thread] = __shfl_down_sync(mask, own, delta, width);
      break;
    case kXor:
      out[thread] = __shfl_xor_sync(mask, own, argument, width);
      break;
  }
}

WCMI_TEST shuffle(int kind, unsigned mask, int argument, int width, int threads, int64_t* out) {
  WCMI_LAUNCH(shuffle_kernel, 1, threads, 0, nullptr, kind, mask, argument, width, out);
  return cudaGetLastError();
}

// Lanes below and above `split` vote on their own, then the whole block does.
__global__ void votes_kernel(int split, const int* predicates, int* out) {
  const int thread = static_cast<int>(threadIdx.x), predicate = predicates[thread];
  const unsigned low = (1u << split) - 1, mask = thread % 32 < split ? low : ~low;
  int* const to = out + 6 * thread;
  to[0] = static_cast<int>(__ballot_sync(mask, predicate));
  to[1] = __any_sync(mask, predicate);
  to[2] = __all_sync(mask, predicate);
  to[3] = __syncthreads_count(predicate);
  to[4] = __syncthreads_or(predicate);
  to[5] = __syncthreads_and(predicate);
}

WCMI_TEST votes(int split, int threads, const int* predicates, int* out) {
  WCMI_LAUNCH(votes_kernel, 1, threads, 0, nullptr, split, predicates, out);
  return cudaGetLastError();
}

// ---- atomics and places -------------------------------------------------------------------------

struct Totals {
  int sum, largest, smallest, last;
  float float_sum;
  uint64_t increments;
};

__global__ void atomics_kernel(Totals* totals) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&totals->sum, i);
  atomicMax(&totals->largest, i);
  atomicMin(&totals->smallest, i);
  atomicExch(&totals->last, i);
  atomicAdd(&totals->float_sum, 0.5f);
  uint64_t seen = totals->increments, expected;
  do {
    expected = seen;
    seen = atomicCAS(&totals->increments, expected, expected + 1);
  } while (seen != expected);
}

WCMI_TEST atomics(int blocks, int threads, Totals* totals) {
  WCMI_LAUNCH(atomics_kernel, blocks, threads, 0, nullptr, totals);
  return cudaGetLastError();
}

// The linear number of the thread in the grid, and the order in which threads begin.
__global__ void places_kernel(int* visits, int* order, int* next) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned i = block * blockDim.x * blockDim.y * blockDim.z + thread;
  atomicAdd(&visits[i], 1);
  order[atomicAdd(next, 1)] = static_cast<int>(i);
}

WCMI_TEST places(const int* sizes, int* visits, int* order, int* next) {
  const dim3 grid(sizes[0], sizes[1], sizes[2]), block(sizes[3], sizes[4], sizes[5]);
  WCMI_LAUNCH(places_kernel, grid, block, 0, nullptr, visits, order, next);
  return cudaGetLastError();
}
