// CUDA form of critic_stats for small inputs; see kernels.h for what it computes. Products are made
// by plain multiply-adds; the Triton form is for everything larger.
#include "statistics.cuh"
#include "storage.cuh"

namespace wcmi {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 16;         // representations of a block
constexpr int kColumns = 64;      // (image, location) pairs of one step of it
constexpr int kDepth = 32;        // units of one step of a product
constexpr int kMaxLocations = 8;  // of a block
constexpr int kPerThread = kColumns / 16;

// ---- forward ------------------------------------------------------------------------------------

struct Sizes {
  int64_t N, P, U;
};

// Column q of a step belongs to location p0 + q % locations and to image j0 + q / locations.
struct Columns {
  int64_t p0, j0;
  int locations;

  __device__ int64_t p(int q) const { return p0 + q % locations; }
  __device__ int64_t j(int q) const { return j0 + q / locations; }
};

// Copies `count` vectors' units from u0 on, zeros beyond their ends; vector(k) is null where there
// is none. A row of `tile` is one longer than kDepth, so that a column of it is in 32 banks.
template <typename S, typename Vector>
__device__ void load_tile(typename S::Wide* tile, int count, int64_t u0, int64_t U, Vector vector) {
  for (int at = threadIdx.x; at < count * kDepth; at += kThreads) {
    const int k = at / kDepth, u = at % kDepth;
    const typename S::Element* from = vector(k);
    const bool inside = from && u0 + u < U;
    tile[k * (kDepth + 1) + u] = inside ? S::widen(from[u0 + u]) : typename S::Wide(0);
  }
}

// The scores of row threadIdx.x / 16 with the columns threadIdx.x % 16 + 16 k.
template <typename S>
__device__ void step_scores(const typename S::Element* z, const typename S::Element* h, int64_t i0,
                            const Columns& columns, const Sizes& sizes, typename S::Wide* tile_z,
                            typename S::Wide* tile_h, typename S::Wide* scores) {
  typedef typename S::Wide T;
  const int row = threadIdx.x / 16, column = threadIdx.x % 16;
  for (int k = 0; k < kPerThread; ++k) scores[k] = 0;
  for (int64_t u0 = 0; u0 < sizes.U; u0 += kDepth) {
    __syncthreads();
    load_tile<S>(tile_z, kRows, u0, sizes.U,
                 [&](int k) { return i0 + k < sizes.N ? z + (i0 + k) * sizes.U : nullptr; });
    load_tile<S>(tile_h, kColumns, u0, sizes.U, [&](int k) {
      const int64_t j = columns.j(k), p = columns.p(k);
      return j < sizes.N && p < sizes.P ? h + (j * sizes.P + p) * sizes.U : nullptr;
    });
    __syncthreads();
    for (int u = 0; u < kDepth; ++u) {
      const T own = tile_z[row * (kDepth + 1) + u];
      for (int k = 0; k < kPerThread; ++k) {
        scores[k] += own * tile_h[(column + 16 * k) * (kDepth + 1) + u];
      }
    }
  }
}

template <typename S>
__global__ void critic_stats_fwd_kernel(const typename S::Element* z, const typename S::Element* h,
                                        Sizes sizes, int locations, Arrays<typename S::Wide> out,
                                        typename S::Wide tau) {
  typedef typename S::Wide T;
  WCMI_SHARED(T, tile_z, kRows * (kDepth + 1));
  WCMI_SHARED(T, tile_h, kColumns * (kDepth + 1));
  WCMI_SHARED(Running<T>, states, kThreads);
  // One dimension: the others' sizes end at 65535. Blocks of the same locations follow each other.
  const unsigned row_tiles = static_cast<unsigned>((sizes.N + kRows - 1) / kRows);
  const int64_t i0 = static_cast<int64_t>(blockIdx.x % row_tiles) * kRows;
  const int64_t i = i0 + threadIdx.x / 16;
  const int column = threadIdx.x % 16;
  Columns columns = {static_cast<int64_t>(blockIdx.x / row_tiles) * locations, 0, locations};
  // `locations` divides 16: all columns of a thread are at this location.
  const int64_t p = columns.p(column);
  const bool active = i < sizes.N && p < sizes.P;
  Running<T> own = nothing<T>();
  for (; columns.j0 < sizes.N; columns.j0 += kColumns / locations) {
    T scores[kPerThread];
    step_scores<S>(z, h, i0, columns, sizes, tile_z, tile_h, scores);
    for (int k = 0; k < kPerThread; ++k) {
      const int64_t j = columns.j(column + 16 * k);
      if (!active || j >= sizes.N) continue;
      if (j == i) {
        out.first[i * sizes.P + p] = scores[k];
      } else {
        add_score(&own, scores[k], tau, out.which);
      }
    }
  }
  // The threads of one row and location are `locations` apart.
  for (int half = 16 / locations / 2; half > 0; half /= 2) {
    __syncthreads();
    states[threadIdx.x] = own;
    __syncthreads();
    if (column < half * locations) merge(&own, states[threadIdx.x + half * locations], tau);
  }
  if (active && column < locations) write_statistics(own, out, i * sizes.P + p, tau);
}

template <typename S>
int launch_fwd(const void* z, const void* h, const Sizes& sizes, int which, double tau, void* stats,
               cudaStream_t stream) {
  typedef typename S::Element E;
  typedef typename S::Wide T;
  int locations = 1;
  while (locations < kMaxLocations && locations < sizes.P) locations *= 2;
  const int64_t blocks = ceil_div(sizes.N, kRows) * ceil_div(sizes.P, locations);
  WCMI_LAUNCH((critic_stats_fwd_kernel<S>), static_cast<unsigned>(blocks), kThreads, 0, stream,
              static_cast<const E*>(z), static_cast<const E*>(h), sizes, locations,
              (Arrays<T>{static_cast<T*>(stats), sizes.N * sizes.P, which}), static_cast<T>(tau));
  return cudaGetLastError();
}

// ---- backward -----------------------------------------------------------------------------------

// The gradient of either side's vectors: dz from all columns (j, p), or dh from all rows i. A block
// has kSide vectors of its own and goes over the other side's, kSide at a time.
constexpr int kSide = 16;

template <typename S>
struct Backward {
  typedef typename S::Element E;
  typedef typename S::Wide T;
  Arrays<const T> d;
  const T* lse;
  const E *z, *h;
  Sizes sizes;
  int64_t dz_blocks, dz_parts;
  T* dz_sums;  // (dz_parts, N, U)
  E* dh;
};

// Vectors first, first + 1, ... of one side, whole.
template <typename S>
__device__ void load_side(typename S::Wide* tile, const typename S::Element* from, int64_t first,
                          int64_t count, int64_t U) {
  const int width = static_cast<int>(U) + 1;
  for (int at = threadIdx.x; at < kSide * static_cast<int>(U); at += kThreads) {
    const int k = at / static_cast<int>(U), u = at % static_cast<int>(U);
    const bool inside = first + k < count;
    tile[k * width + u] = inside ? S::widen(from[(first + k) * U + u]) : typename S::Wide(0);
  }
}

// The gradient of the score of representation i with column c; 0 where there is none.
template <typename S>
__device__ typename S::Wide slope_at(const Backward<S>& b, int64_t i, int64_t c,
                                     const typename S::Wide* vector_a,
                                     const typename S::Wide* vector_b) {
  typedef typename S::Wide T;
  if (i >= b.sizes.N || c >= b.sizes.N * b.sizes.P) return T(0);
  const int64_t j = c / b.sizes.P, p = c % b.sizes.P;
  const auto slopes = read_slopes(b.d, b.lse, i * b.sizes.P + p);
  if (i == j) return slopes.positive;
  T score = 0;
  for (int u = 0; u < static_cast<int>(b.sizes.U); ++u) score += vector_a[u] * vector_b[u];
  return score_slope(score, slopes, b.d.which);
}

// Sums the gradients of own vectors from `first_own` on over the others' tiles `first`, first +
// stride, ...; the calling thread's are those of unit threadIdx.x % units, vectors threadIdx.x /
// units + k * groups.
template <typename S, bool kOwnIsZ>
__device__ void sum_gradients(const Backward<S>& b, int64_t first_own, int64_t first,
                              int64_t stride, int units, typename S::Wide* shared,
                              typename S::Wide* sums) {
  typedef typename S::Wide T;
  const int width = static_cast<int>(b.sizes.U) + 1;
  const int64_t all_columns = b.sizes.N * b.sizes.P;
  const int64_t own_count = kOwnIsZ ? b.sizes.N : all_columns;
  const int64_t other_count = kOwnIsZ ? all_columns : b.sizes.N;
  T *own = shared, *other = own + kSide * width, *slopes = other + kSide * width;
  const int mine = threadIdx.x / kSide, theirs = threadIdx.x % kSide;
  const int u = threadIdx.x % units, group = threadIdx.x / units, groups = kThreads / units;
  for (int k = 0; k < kSide; ++k) sums[k] = 0;
  load_side<S>(own, kOwnIsZ ? b.z : b.h, first_own, own_count, b.sizes.U);
  for (int64_t tile = first; tile * kSide < other_count; tile += stride) {
    __syncthreads();
    load_side<S>(other, kOwnIsZ ? b.h : b.z, tile * kSide, other_count, b.sizes.U);
    __syncthreads();
    const int64_t me = first_own + mine, them = tile * kSide + theirs;
    slopes[mine * kSide + theirs] = slope_at(b, kOwnIsZ ? me : them, kOwnIsZ ? them : me,
                                             own + mine * width, other + theirs * width);
    __syncthreads();
    if (u >= b.sizes.U) continue;
    for (int v = 0; v < kSide; ++v) {
      const T x = other[v * width + u];
      for (int k = 0; k < kSide; ++k) {
        if (group + k * groups < kSide) sums[k] += slopes[(group + k * groups) * kSide + v] * x;
      }
    }
  }
}

template <typename S>
__global__ void critic_stats_bwd_kernel(Backward<S> b, int units) {
  typedef typename S::Wide T;
  WCMI_DYNAMIC_SHARED(T, shared);
  const int u = threadIdx.x % units, group = threadIdx.x / units, groups = kThreads / units;
  const int64_t block = blockIdx.x;
  T sums[kSide];
  if (block < b.dz_blocks) {
    const int64_t part = block % b.dz_parts, first = block / b.dz_parts * kSide;
    sum_gradients<S, true>(b, first, part, b.dz_parts, units, shared, sums);
    for (int k = 0; k < kSide; ++k) {
      const int64_t i = first + group + k * groups;
      if (u >= b.sizes.U || group + k * groups >= kSide || i >= b.sizes.N) continue;
      b.dz_sums[(part * b.sizes.N + i) * b.sizes.U + u] = sums[k];
    }
    return;
  }
  const int64_t first = (block - b.dz_blocks) * kSide;
  sum_gradients<S, false>(b, first, 0, 1, units, shared, sums);
  for (int k = 0; k < kSide; ++k) {
    const int64_t c = first + group + k * groups;
    if (u >= b.sizes.U || group + k * groups >= kSide || c >= b.sizes.N * b.sizes.P) continue;
    b.dh[c * b.sizes.U + u] = S::narrow(sums[k]);
  }
}

// Adds the parts of dz in their order.
template <typename S>
__global__ void sum_parts_kernel(const typename S::Wide* parts, int64_t count, int64_t size,
                                 typename S::Element* dz) {
  for (int64_t at = thread_index(); at < size; at += thread_count()) {
    typename S::Wide sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * size + at];
    dz[at] = S::narrow(sum);
  }
}

template <typename S>
int launch_bwd(const void* d, const void* z, const void* h, const void* lse, const Sizes& sizes,
               int which, void* dz, void* dh, void* workspace, cudaStream_t stream) {
  typedef typename S::Element E;
  typedef typename S::Wide T;
  int units = 1;
  while (units < sizes.U) units *= 2;
  const int64_t parts = critic_stats_bwd_parts(sizes.N, sizes.P);
  const int64_t dz_blocks = dz ? ceil_div(sizes.N, kSide) * parts : 0;
  const int64_t dh_blocks = dh ? ceil_div(sizes.N * sizes.P, kSide) : 0;
  if (dz_blocks + dh_blocks == 0) return cudaSuccess;
  const Backward<S> b = {{static_cast<const T*>(d), sizes.N * sizes.P, which},
                         static_cast<const T*>(lse),
                         static_cast<const E*>(z),
                         static_cast<const E*>(h),
                         sizes,
                         dz_blocks,
                         parts,
                         static_cast<T*>(workspace),
                         static_cast<E*>(dh)};
  const size_t bytes = sizeof(T) * (2 * kSide * (sizes.U + 1) + kSide * kSide);
  WCMI_LAUNCH((critic_stats_bwd_kernel<S>), static_cast<unsigned>(dz_blocks + dh_blocks), kThreads,
              bytes, stream, b, units);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || !dz) return error;
  const int64_t size = sizes.N * sizes.U;
  WCMI_LAUNCH((sum_parts_kernel<S>), blocks_for(size, kThreads), kThreads, 0, stream,
              static_cast<const T*>(workspace), parts, size, static_cast<E*>(dz));
  return cudaGetLastError();
}

}  // namespace

int critic_stats_fwd_cuda(const void* z, const void* h, int64_t N, int64_t P, int64_t U, int dtype,
                          int which, double tau, void* stats, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  return for_storage(dtype, [=](auto storage) {
    return launch_fwd<decltype(storage)>(z, h, {N, P, U}, which, tau, stats,
                                         static_cast<cudaStream_t>(stream));
  });
}

int critic_stats_bwd_cuda(const void* d, const void* z, const void* h, const void* lse, int64_t N,
                          int64_t P, int64_t U, int dtype, int which, void* dz, void* dh,
                          void* workspace, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  return for_storage(dtype, [=](auto storage) {
    return launch_bwd<decltype(storage)>(d, z, h, lse, {N, P, U}, which, dz, dh, workspace,
                                         static_cast<cudaStream_t>(stream));
  });
}

}  // namespace wcmi
