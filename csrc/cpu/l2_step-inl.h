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
static constexpr int64_t kChunk = 512;  // elements that are computed before they are used

typedef double LaneSums __attribute__((vector_size(kLanes * sizeof(double))));

static inline void scale_chunk(double scale, int64_t count, double* chunk) {
  for (int64_t i = 0; i < count; ++i) chunk[i] *= scale;
}

// What runs over a row does so in chunks: `fill(at, count, out)` writes elements at, at + 1, ...
template <typename Fill>
static inline double sum_of_squares(int64_t size, double scale, Fill fill) {
  LaneSums sums = {};
  for (int64_t at = 0; at < size; at += kChunk) {
    double chunk[kChunk];
    const int64_t count = size - at < kChunk ? size - at : kChunk;
    fill(at, count, chunk);
    if (scale != 1) scale_chunk(scale, count, chunk);
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

static inline double sign_if_infinite(double v) {
  const double infinity = __builtin_inf();
  return static_cast<double>(v == infinity) - static_cast<double>(v == -infinity);
}

// A row's norm, and what divides by it: v -> (v * scale) * inverse, where scale is a power of two
// that keeps squares in range. Infinities outweigh the rest: they count as +-1, the rest as 0.
struct Norm {
  double norm, scale, inverse;
  bool infinite;
};

template <typename Fill>
static inline Norm norm_of(int64_t size, Fill fill) {
  const double infinity = __builtin_inf();
  Norm result = {0, 1, 0, false};
  double sum = sum_of_squares(size, 1, fill);
  if (!(sum > 1e-200)) result.scale = 0x1p600;
  if (sum == infinity) result.scale = 0x1p-600;
  if (result.scale != 1) sum = sum_of_squares(size, result.scale, fill);
  result.norm = sqrt(sum) / result.scale;
  result.infinite = sum == infinity;
  if (result.infinite) {
    sum = sum_of_squares(size, 1, [=](int64_t at, int64_t count, double* out) {
      fill(at, count, out);
      for (int64_t i = 0; i < count; ++i) out[i] = sign_if_infinite(out[i]);
    });
  }
  // A row of zeros has no direction. NaN stays.
  result.inverse = sum == 0 ? 0 : 1 / sqrt(sum);
  return result;
}

// v <- start + length v / |v|, element by element of a chunk.
template <typename S>
static inline void along(const typename S::Element* start, double length, const Norm& norm,
                         int64_t count, double* v) {
  if (norm.infinite) {
    for (int64_t i = 0; i < count; ++i) v[i] = sign_if_infinite(v[i]);
  } else if (norm.scale != 1) {
    scale_chunk(norm.scale, count, v);
  }
  for (int64_t i = 0; i < count; ++i) {
    v[i] = static_cast<double>(S::widen(start[i])) + length * (v[i] * norm.inverse);
  }
}

template <typename S>
static inline void widen_chunk(const typename S::Element* from, int64_t count, double* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<double>(S::widen(from[i]));
}

// `fill` may read x: a chunk is written when it is complete.
template <typename S, typename Fill>
static inline void write_clipped(typename S::Element* x, int64_t size, double lo, double hi,
                                 Fill fill) {
  typedef typename S::Wide T;
  for (int64_t at = 0; at < size; at += kChunk) {
    double chunk[kChunk];
    const int64_t count = size - at < kChunk ? size - at : kChunk;
    fill(at, count, chunk);
    for (int64_t i = 0; i < count; ++i) {
      x[at + i] = S::narrow(static_cast<T>(at_most(at_least(chunk[i], lo), hi)));
    }
  }
}

template <typename S>
static void l2_step_row(typename S::Element* x, const typename S::Element* grad,
                        const typename S::Element* origin, int64_t size, double eps,
                        double step_size, double lo, double hi) {
  const auto gradient = [=](int64_t at, int64_t count, double* out) {
    widen_chunk<S>(grad + at, count, out);
  };
  const Norm of_grad = norm_of(size, gradient);
  if (of_grad.norm != of_grad.norm) return;
  const auto moved = [=](int64_t at, int64_t count, double* out) {
    gradient(at, count, out);
    along<S>(x + at, step_size, of_grad, count, out);
  };
  const auto offset = [=](int64_t at, int64_t count, double* out) {
    moved(at, count, out);
    for (int64_t i = 0; i < count; ++i) out[i] -= static_cast<double>(S::widen(origin[at + i]));
  };
  const Norm of_offset = norm_of(size, offset);
  if (of_offset.norm <= eps) {
    return write_clipped<S>(x, size, lo, hi, moved);
  }
  write_clipped<S>(x, size, lo, hi, [=](int64_t at, int64_t count, double* out) {
    offset(at, count, out);
    along<S>(origin + at, eps, of_offset, count, out);
  });
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
