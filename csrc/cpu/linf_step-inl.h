// Body of linf_step, compiled once per instruction set; see kernels.h for what it computes.
// The including file defines WCMI_LEVEL. Plain loops: the compiler vectorises them, and with
// -ffp-contract=off each operation rounds as torch's does.
#include <stdint.h>
#include <string.h>

#include "../kernels.h"

namespace wcmi {
namespace WCMI_LEVEL {

#include "storage-inl.h"

static constexpr int64_t kParallelElements = 32768;

template <typename S>
static void linf_step_run(typename S::Element* x, const typename S::Element* grad,
                          const typename S::Element* origin, int64_t count, typename S::Wide eps,
                          typename S::Wide step, typename S::Wide lo, typename S::Wide hi) {
  typedef typename S::Wide T;
  // Torch rounds the step times the sign: 0 for a sign of 0, even if the step rounds to infinity.
  const T rounded_step = rounded<S>(step);
  for (int64_t i = 0; i < count; ++i) {
    const T g = S::widen(grad[i]);
    const T start = S::widen(x[i]);
    const T centre = S::widen(origin[i]);
    const T up = g > 0 ? rounded_step : 0;
    const T down = g < 0 ? rounded_step : 0;
    const T low = rounded<S>(centre - eps);
    const T high = rounded<S>(centre + eps);
    T moved = at_most(at_least(rounded<S>(start + (up - down)), low), high);
    moved = at_most(at_least(moved, lo), hi);
    // NaN where torch's bounds are: one test here costs less than one at each bound.
    moved = __builtin_isunordered(low, high) ? low + high : moved;
    x[i] = g == g ? S::narrow(moved) : x[i];
  }
}

template <typename S>
static void linf_step_as(void* x, const void* grad, const void* origin, int64_t count, double eps,
                         double step_size, double lo, double hi, int threads) {
  typedef typename S::Element E;
  typedef typename S::Wide T;
  constexpr int64_t kBlock = 16384;
  const int64_t blocks = (count + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) schedule(static) if (count > kParallelElements)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t at = block * kBlock;
    const int64_t size = count - at < kBlock ? count - at : kBlock;
    // Torch's CPU kernels round the scalar of a sum (eps) to the storage type, not a product's.
    linf_step_run<S>(static_cast<E*>(x) + at, static_cast<const E*>(grad) + at,
                     static_cast<const E*>(origin) + at, size, rounded<S>(static_cast<T>(eps)),
                     static_cast<T>(step_size), rounded<S>(static_cast<T>(lo)),
                     rounded<S>(static_cast<T>(hi)));
  }
}

static void linf_step(void* x, const void* grad, const void* origin, int64_t count, int dtype,
                      double eps, double step_size, double lo, double hi, int threads) {
  switch (dtype) {
    case kFloat32:
      return linf_step_as<Float32>(x, grad, origin, count, eps, step_size, lo, hi, threads);
    case kFloat64:
      return linf_step_as<Float64>(x, grad, origin, count, eps, step_size, lo, hi, threads);
    case kBFloat16:
      return linf_step_as<BFloat16>(x, grad, origin, count, eps, step_size, lo, hi, threads);
    case kFloat16:
      return linf_step_as<Float16>(x, grad, origin, count, eps, step_size, lo, hi, threads);
  }
}

void fill_linf_step(CpuKernels* kernels) { kernels->linf_step = linf_step; }

}  // namespace WCMI_LEVEL
}  // namespace wcmi
