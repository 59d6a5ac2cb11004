// Body of linf_start, compiled once per instruction set; see kernels.h for what it computes.
// The including file defines WCMI_LEVEL. Plain loops: the compiler vectorises them, and with
// -ffp-contract=off each operation rounds as torch's does.
#include <stdint.h>
#include <string.h>

#include "../kernels.h"

namespace wcmi {
namespace WCMI_LEVEL {

#include "storage-inl.h"

static constexpr int64_t kParallelElements = 32768;
static constexpr int64_t kCounters = 64;            // computed side by side
static constexpr int64_t kNumbers = 4 * kCounters;  // each counter gives four

// Philox4x32-10 (Salmon et al. 2011) of the counters first, first + 1, ...; words[4 k + w] is word
// w of counter first + k.
static void philox(uint64_t first, uint64_t key, uint32_t* words) {
  uint32_t c0[kCounters], c1[kCounters], c2[kCounters] = {}, c3[kCounters] = {};
  for (int64_t k = 0; k < kCounters; ++k) {
    c0[k] = static_cast<uint32_t>(first + k);
    c1[k] = static_cast<uint32_t>((first + k) >> 32);
  }
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int64_t k = 0; k < kCounters; ++k) {
      const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0[k];
      const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2[k];
      c0[k] = static_cast<uint32_t>(product1 >> 32) ^ c1[k] ^ key0;
      c1[k] = static_cast<uint32_t>(product1);
      c2[k] = static_cast<uint32_t>(product0 >> 32) ^ c3[k] ^ key1;
      c3[k] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  for (int64_t k = 0; k < kCounters; ++k) {
    words[4 * k] = c0[k];
    words[4 * k + 1] = c1[k];
    words[4 * k + 2] = c2[k];
    words[4 * k + 3] = c3[k];
  }
}

// `first` is the index of the first element, a multiple of kNumbers; count <= kNumbers.
template <typename S>
static void linf_start_run(typename S::Element* x, const typename S::Element* origin, int64_t first,
                           int64_t count, uint64_t seed, typename S::Wide eps, typename S::Wide lo,
                           typename S::Wide hi) {
  typedef typename S::Wide T;
  uint32_t words[kNumbers];
  philox(static_cast<uint64_t>(first) / 4, seed, words);
  for (int64_t i = 0; i < count; ++i) {
    // 24 bits, which float32 holds exactly: a multiple of 2^-23 in [-1, 1).
    const T u = static_cast<T>(static_cast<int32_t>(words[i] >> 8)) * static_cast<T>(0x1p-23) - 1;
    const T centre = S::widen(origin[first + i]);
    // No clip to the ball: rounding is monotone, so this is between centre -+ eps, rounded.
    const T point = centre + eps * u;
    x[first + i] = S::narrow(at_most(at_least(point, lo), hi));
  }
}

template <typename S>
static void linf_start_as(void* x, const void* origin, int64_t count, double eps, int64_t seed,
                          double lo, double hi, int threads) {
  typedef typename S::Element E;
  typedef typename S::Wide T;
  const int64_t blocks = (count + kNumbers - 1) / kNumbers;
#pragma omp parallel for num_threads(threads) schedule(static) if (count > kParallelElements)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = block * kNumbers;
    const int64_t size = count - first < kNumbers ? count - first : kNumbers;
    linf_start_run<S>(static_cast<E*>(x), static_cast<const E*>(origin), first, size,
                      static_cast<uint64_t>(seed), static_cast<T>(eps), static_cast<T>(lo),
                      static_cast<T>(hi));
  }
}

static void linf_start(void* x, const void* origin, int64_t count, int dtype, double eps,
                       int64_t seed, double lo, double hi, int threads) {
  switch (dtype) {
    case kFloat32:
      return linf_start_as<Float32>(x, origin, count, eps, seed, lo, hi, threads);
    case kFloat64:
      return linf_start_as<Float64>(x, origin, count, eps, seed, lo, hi, threads);
    case kBFloat16:
      return linf_start_as<BFloat16>(x, origin, count, eps, seed, lo, hi, threads);
    case kFloat16:
      return linf_start_as<Float16>(x, origin, count, eps, seed, lo, hi, threads);
  }
}

void fill_linf_start(CpuKernels* kernels) { kernels->linf_start = linf_start; }

}  // namespace WCMI_LEVEL
}  // namespace wcmi
