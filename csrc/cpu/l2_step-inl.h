// Body of l2_step, compiled once per instruction set; see kernels.h for what it computes.
// The including file defines WCMI_LEVEL. Every type is computed in double, and sums run over
// kLanes lanes whatever the vector's width: with -ffp-contract=off all levels give the same bits.
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../kernels.h"

namespace wcmi {
namespace WCMI_LEVEL {

#include "storage-inl.h"

static constexpr int64_t kParallelElements = 16384;
static constexpr int64_t kLanes = 8;
static constexpr int64_t kChunk = 512;  // elements that are computed before they are summed

typedef double LaneSums __attribute__((vector_size(kLanes * sizeof(double))));

// The sum of (scale * element(i))^2.
template <typename Element>
static inline double sum_of_squares(int64_t size, double scale, Element element) {
  LaneSums sums = {};
  for (int64_t at = 0; at < size; at += kChunk) {
    double chunk[kChunk + kLanes];
    const int64_t count = size - at < kChunk ? size - at : kChunk;
    for (int64_t i = 0; i < count; ++i) chunk[i] = scale * element(at + i);
    for (int64_t i = count; i % kLanes != 0; ++i) chunk[i] = 0;
    for (int64_t i = 0; i < count; i += kLanes) {
      LaneSums part;
      memcpy(&part, chunk + i, sizeof(part));
      sums += part * part;
    }
  }
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

// A row's norm, and what divides by it: v -> (v * scale) * inverse, where scale is a power of two
// that keeps squares in range. Infinities outweigh the rest: they count as +-1, the rest as 0.
struct Norm {
  double norm, scale, inverse;
  bool infinite;
};

static inline double unit(double v, const Norm& norm) {
  const double sign = static_cast<double>(v == static_cast<double>(__builtin_inf())) -
                      static_cast<double>(v == -static_cast<double>(__builtin_inf()));
  return (norm.infinite ? sign : v * norm.scale) * norm.inverse;
}

template <typename Element>
static inline Norm norm_of(int64_t size, Element element) {
  const double kInfinity = __builtin_inf();
  Norm result = {0, 1, 0, false};
  double sum = sum_of_squares(size, 1, element);
  if (!(sum > 1e-200)) result.scale = 0x1p600;
  if (sum == kInfinity) result.scale = 0x1p-600;
  if (result.scale != 1) sum = sum_of_squares(size, result.scale, element);
  result.norm = sqrt(sum) / result.scale;
  result.infinite = sum == kInfinity;
  if (result.infinite) {
    sum = 0;
    for (int64_t i = 0; i < size; ++i) {
      const double v = element(i);
      sum += v == kInfinity || v == -kInfinity ? 1 : 0;
    }
  }
  // A row of zeros has no direction. NaN stays.
  result.inverse = sum == 0 ? 0 : 1 / sqrt(sum);
  return result;
}

template <typename S>
static void l2_step_row(typename S::Element* x, const typename S::Element* grad,
                        const typename S::Element* origin, int64_t size, double eps,
                        double step_size, double lo, double hi) {
  typedef typename S::Wide T;
  const auto gradient = [=](int64_t i) { return static_cast<double>(S::widen(grad[i])); };
  const auto centre = [=](int64_t i) { return static_cast<double>(S::widen(origin[i])); };
  const Norm of_grad = norm_of(size, gradient);
  if (of_grad.norm != of_grad.norm) return;
  const auto moved = [=](int64_t i) {
    return static_cast<double>(S::widen(x[i])) + step_size * unit(gradient(i), of_grad);
  };
  const auto offset = [=](int64_t i) { return moved(i) - centre(i); };
  const Norm of_offset = norm_of(size, offset);
  const bool inside = of_offset.norm <= eps;
  for (int64_t i = 0; i < size; ++i) {
    const double point = inside ? moved(i) : centre(i) + eps * unit(offset(i), of_offset);
    x[i] = S::narrow(static_cast<T>(at_most(at_least(point, lo), hi)));
  }
}

template <typename S>
static void l2_step_as(void* x, const void* grad, const void* origin, int64_t rows, int64_t size,
                       double eps, double step_size, double lo, double hi, int threads) {
  typedef typename S::Element E;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * size > kParallelElements)
  for (int64_t row = 0; row < rows; ++row) {
    l2_step_row<S>(static_cast<E*>(x) + row * size, static_cast<const E*>(grad) + row * size,
                   static_cast<const E*>(origin) + row * size, size, eps, step_size, lo, hi);
  }
}

static void l2_step(void* x, const void* grad, const void* origin, int64_t rows, int64_t size,
                    int dtype, double eps, double step_size, double lo, double hi, int threads) {
  switch (dtype) {
    case kFloat32:
      return l2_step_as<Float32>(x, grad, origin, rows, size, eps, step_size, lo, hi, threads);
    case kFloat64:
      return l2_step_as<Float64>(x, grad, origin, rows, size, eps, step_size, lo, hi, threads);
    case kBFloat16:
      return l2_step_as<BFloat16>(x, grad, origin, rows, size, eps, step_size, lo, hi, threads);
    case kFloat16:
      return l2_step_as<Float16>(x, grad, origin, rows, size, eps, step_size, lo, hi, threads);
  }
}

void fill_l2_step(CpuKernels* kernels) { kernels->l2_step = l2_step; }

}  // namespace WCMI_LEVEL
}  // namespace wcmi
