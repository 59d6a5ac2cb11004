// Body of linf_step, compiled once per instruction set; see kernels.h for what it computes.
// The including file defines WCMI_LEVEL. Plain loops: the compiler vectorises them, and with
// -ffp-contract=off each operation rounds as torch's does.
#include <stdint.h>
#include <string.h>

#include "../kernels.h"

namespace wcmi {
namespace WCMI_LEVEL {

static constexpr int64_t kParallelElements = 32768;

template <typename To, typename From>
static inline To bits_of(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

// A storage type's element, the type that its arithmetic is done in, and the ways between them.
struct Float32 {
  typedef float Element;
  typedef float Wide;
  static inline Wide widen(Element x) { return x; }
  static inline Element narrow(Wide x) { return x; }
};

struct Float64 {
  typedef double Element;
  typedef double Wide;
  static inline Wide widen(Element x) { return x; }
  static inline Element narrow(Wide x) { return x; }
};

struct BFloat16 {
  typedef uint16_t Element;
  typedef float Wide;
  static inline Wide widen(Element x) { return bits_of<float>(static_cast<uint32_t>(x) << 16); }
  static inline Element narrow(Wide x) {
    const uint32_t bits = bits_of<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return x == x ? static_cast<Element>(rounded) : static_cast<Element>(0x7fc0);
  }
};

struct Float16 {
  typedef uint16_t Element;
  typedef float Wide;
  static inline Wide widen(Element x) {
    const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fffu) << 13;
    const uint32_t exponent = magnitude & 0x0f800000u;
    const uint32_t rebias = exponent == 0x0f800000u ? (255u - 31u) << 23 : (127u - 15u) << 23;
    // A subnormal: with the exponent of 2^-14 the hidden bit is one too many; subtract it.
    const float subnormal = bits_of<float>(magnitude + (113u << 23)) - bits_of<float>(113u << 23);
    const uint32_t value = exponent == 0 ? bits_of<uint32_t>(subnormal) : magnitude + rebias;
    return bits_of<float>(value | (static_cast<uint32_t>(x & 0x8000u) << 16));
  }
  static inline Element narrow(Wide x) {
    const uint32_t bits = bits_of<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 puts a subnormal half's bits, correctly rounded, at the bottom of the mantissa.
    const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t value = magnitude < 0x38800000u ? subnormal : normal;
    value = magnitude >= 0x477ff000u ? 0x7c00u : value;
    value = magnitude > 0x7f800000u ? 0x7e00u : value;
    return static_cast<Element>(value | sign);
  }
};

template <typename S>
static inline typename S::Wide rounded(typename S::Wide x) {
  return S::widen(S::narrow(x));
}

// Maximum and minimum that keep a NaN of either side, and `x` when both are equal.
template <typename T>
static inline T at_least(T x, T bound) {
  return x < bound || bound != bound ? bound : x;
}

template <typename T>
static inline T at_most(T x, T bound) {
  return x > bound || bound != bound ? bound : x;
}

template <typename S>
static void linf_step_run(typename S::Element* x, const typename S::Element* grad,
                          const typename S::Element* origin, int64_t count, typename S::Wide eps,
                          typename S::Wide step, typename S::Wide lo, typename S::Wide hi) {
  typedef typename S::Wide T;
  for (int64_t i = 0; i < count; ++i) {
    const T g = S::widen(grad[i]);
    const T start = S::widen(x[i]);
    const T centre = S::widen(origin[i]);
    const T sign = static_cast<T>(g > 0) - static_cast<T>(g < 0);
    // Rounded after the product: a step beyond the type's range times a sign of 0 is 0, not NaN.
    T moved = rounded<S>(start + rounded<S>(sign * step));
    moved = at_least(moved, rounded<S>(centre - eps));
    moved = at_most(moved, rounded<S>(centre + eps));
    moved = at_most(at_least(moved, lo), hi);
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
