// CUDA form of linf_step; see kernels.h for what it computes. Built with --fmad=false, so that
// every operation rounds as torch's does on the CPU.
#include "storage.cuh"

namespace wcmi {
namespace {

// What every element needs, rounded as torch rounds scalars: a sum's to the storage type.
template <typename T>
struct Budget {
  T eps, step, lo, hi;
};

template <typename S>
__device__ typename S::Element stepped(typename S::Element x, typename S::Element grad,
                                       typename S::Element origin,
                                       const Budget<typename S::Wide>& budget) {
  typedef typename S::Wide T;
  const T g = S::widen(grad);
  if (g != g) return x;
  // 0 for a sign of 0, even if the step rounds to infinity.
  const T move = (g > 0 ? budget.step : T(0)) - (g < 0 ? budget.step : T(0));
  const T centre = S::widen(origin);
  T moved = rounded<S>(S::widen(x) + move);
  moved = at_least(moved, rounded<S>(centre - budget.eps));
  moved = at_most(moved, rounded<S>(centre + budget.eps));
  return S::narrow(at_most(at_least(moved, budget.lo), budget.hi));
}

// The first `packs` runs of kCount elements, then the rest one by one.
template <typename S, int kCount>
__global__ void linf_step_kernel(typename S::Element* x, const typename S::Element* grad,
                                 const typename S::Element* origin, int64_t count, int64_t packs,
                                 Budget<typename S::Wide> budget) {
  for (int64_t i = thread_index(); i < packs; i += thread_count()) {
    const int64_t at = i * kCount;
    auto own = load_pack<S, kCount>(x + at);
    const auto g = load_pack<S, kCount>(grad + at);
    const auto centre = load_pack<S, kCount>(origin + at);
    for (int k = 0; k < kCount; ++k)
      own.at[k] = stepped<S>(own.at[k], g.at[k], centre.at[k], budget);
    store_pack<S, kCount>(x + at, own);
  }
  for (int64_t i = packs * kCount + thread_index(); i < count; i += thread_count()) {
    x[i] = stepped<S>(x[i], grad[i], origin[i], budget);
  }
}

template <typename S>
int launch(void* x, const void* grad, const void* origin, int64_t count, double eps,
           double step_size, double lo, double hi, cudaStream_t stream) {
  typedef typename S::Element E;
  typedef typename S::Wide T;
  constexpr int kThreads = 256, kCount = pack_size<S>();
  const Budget<T> budget = {rounded<S>(static_cast<T>(eps)), rounded<S>(static_cast<T>(step_size)),
                            rounded<S>(static_cast<T>(lo)), rounded<S>(static_cast<T>(hi))};
  const bool vector = aligned(x) && aligned(grad) && aligned(origin);
  const int64_t packs = vector ? count / kCount : 0;
  WCMI_LAUNCH((linf_step_kernel<S, kCount>), blocks_for(vector ? packs + 1 : count, kThreads),
              kThreads, 0, stream, static_cast<E*>(x), static_cast<const E*>(grad),
              static_cast<const E*>(origin), count, packs, budget);
  return cudaGetLastError();
}

}  // namespace

int linf_step_cuda(void* x, const void* grad, const void* origin, int64_t count, int dtype,
                   double eps, double step_size, double lo, double hi, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (count == 0) return cudaSuccess;
  return for_storage(dtype, [=](auto storage) {
    return launch<decltype(storage)>(x, grad, origin, count, eps, step_size, lo, hi,
                                     static_cast<cudaStream_t>(stream));
  });
}

}  // namespace wcmi
