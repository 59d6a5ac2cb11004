// CUDA form of score_stats: critic_stats of scores that are given; see kernels.h. A thread stays at
// kCount neighbouring locations of one row and strides over its images.
#include "statistics.cuh"
#include "storage.cuh"

namespace wcmi {
namespace {

constexpr int kThreads = 256;

// Where a thread works: `lanes` threads cover the locations, `slots` the images.
struct Place {
  int lanes, slots, slot;
  int64_t p;
  bool active;
};

template <int kCount>
__device__ Place place_of(int64_t P) {
  const int64_t packs = P / kCount;
  Place place;
  place.lanes = static_cast<int>(packs < kThreads ? packs : kThreads);
  place.slots = kThreads / place.lanes;
  const int lane = threadIdx.x % place.lanes;
  place.slot = threadIdx.x / place.lanes;
  place.p = (static_cast<int64_t>(blockIdx.y) * place.lanes + lane) * kCount;
  place.active = place.slot < place.slots && place.p < P;
  return place;
}

template <typename S, int kCount>
__device__ void fwd_row(const typename S::Element* row, int64_t i, int64_t N, int64_t P,
                        const Place& place, const Arrays<typename S::Wide>& out,
                        typename S::Wide tau, Running<typename S::Wide>* states) {
  typedef typename S::Wide T;
  Running<T> own[kCount];
  for (int k = 0; k < kCount; ++k) own[k] = nothing<T>();
  for (int64_t j = place.slot; place.active && j < N; j += place.slots) {
    const auto scores = load_pack<S, kCount>(row + j * P + place.p);
    for (int k = 0; k < kCount; ++k) {
      const T x = S::widen(scores.at[k]);
      if (j == i) {
        out.first[i * P + place.p + k] = x;
      } else {
        add_score(own + k, x, tau, out.which);
      }
    }
  }
  for (int k = 0; k < kCount; ++k) {
    merge_threads(own + k, place.lanes, place.lanes * place.slots, tau, states);
    if (place.active && place.slot == 0) {
      write_statistics(own[k], out, i * P + place.p + k, tau);
    }
  }
}

template <typename S, int kCount>
__global__ void score_stats_fwd_kernel(const typename S::Element* scores, int64_t N, int64_t P,
                                       Arrays<typename S::Wide> out, typename S::Wide tau) {
  WCMI_SHARED(Running<typename S::Wide>, states, kThreads);
  const Place place = place_of<kCount>(P);
  for (int64_t i = blockIdx.x; i < N; i += gridDim.x) {
    fwd_row<S, kCount>(scores + i * N * P, i, N, P, place, out, tau, states);
  }
}

template <typename S, int kCount>
__global__ void score_stats_bwd_kernel(Arrays<const typename S::Wide> d,
                                       const typename S::Element* scores,
                                       const typename S::Wide* lse, int64_t N, int64_t P,
                                       typename S::Element* dscores) {
  typedef typename S::Wide T;
  const Place place = place_of<kCount>(P);
  if (!place.active) return;
  for (int64_t i = blockIdx.x; i < N; i += gridDim.x) {
    Slopes<T> slopes[kCount];
    for (int k = 0; k < kCount; ++k) slopes[k] = read_slopes(d, lse, i * P + place.p + k);
    for (int64_t j = place.slot; j < N; j += place.slots) {
      const int64_t at = (i * N + j) * P + place.p;
      auto pack = load_pack<S, kCount>(scores + at);
      for (int k = 0; k < kCount; ++k) {
        const T slope = score_slope(S::widen(pack.at[k]), slopes[k], d.which);
        pack.at[k] = S::narrow(j == i ? slopes[k].positive : slope);
      }
      store_pack<S, kCount>(dscores + at, pack);
    }
  }
}

dim3 grid_of(int64_t N, int64_t P, int count) {
  const int64_t tiles = ceil_div(ceil_div(P, count), kThreads);
  return dim3(blocks_for(N, 1), static_cast<unsigned>(tiles));
}

template <typename S>
int launch_fwd(const void* scores, int64_t N, int64_t P, int which, double tau, void* stats,
               cudaStream_t stream) {
  typedef typename S::Wide T;
  constexpr int kCount = pack_size<S>();
  const bool vector = aligned(scores) && P % kCount == 0;
  const auto kernel = vector ? score_stats_fwd_kernel<S, kCount> : score_stats_fwd_kernel<S, 1>;
  WCMI_LAUNCH(kernel, grid_of(N, P, vector ? kCount : 1), kThreads, 0, stream,
              static_cast<const typename S::Element*>(scores), N, P,
              (Arrays<T>{static_cast<T*>(stats), N * P, which}), static_cast<T>(tau));
  return cudaGetLastError();
}

template <typename S>
int launch_bwd(const void* d, const void* scores, const void* lse, int64_t N, int64_t P, int which,
               void* dscores, cudaStream_t stream) {
  typedef typename S::Element E;
  typedef typename S::Wide T;
  constexpr int kCount = pack_size<S>();
  const bool vector = aligned(scores) && aligned(dscores) && P % kCount == 0;
  const auto kernel = vector ? score_stats_bwd_kernel<S, kCount> : score_stats_bwd_kernel<S, 1>;
  WCMI_LAUNCH(kernel, grid_of(N, P, vector ? kCount : 1), kThreads, 0, stream,
              (Arrays<const T>{static_cast<const T*>(d), N * P, which}),
              static_cast<const E*>(scores), static_cast<const T*>(lse), N, P,
              static_cast<E*>(dscores));
  return cudaGetLastError();
}

}  // namespace

int score_stats_fwd_cuda(const void* scores, int64_t N, int64_t P, int dtype, int which, double tau,
                         void* stats, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  return for_storage(dtype, [=](auto storage) {
    return launch_fwd<decltype(storage)>(scores, N, P, which, tau, stats,
                                         static_cast<cudaStream_t>(stream));
  });
}

int score_stats_bwd_cuda(const void* d, const void* scores, const void* lse, int64_t N, int64_t P,
                         int dtype, int which, void* dscores, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  return for_storage(dtype, [=](auto storage) {
    return launch_bwd<decltype(storage)>(d, scores, lse, N, P, which, dscores,
                                         static_cast<cudaStream_t>(stream));
  });
}

}  // namespace wcmi
