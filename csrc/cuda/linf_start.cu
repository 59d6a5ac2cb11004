// CUDA form of linf_start; see kernels.h for what it computes. Built with --fmad=false.
#include "storage.cuh"

namespace wcmi {
namespace {

// Philox4x32-10 (Salmon et al. 2011) of one counter.
__device__ void philox(uint64_t counter, uint64_t key, uint32_t* words) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0;
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

template <typename S>
__device__ typename S::Element started(typename S::Element origin, uint32_t word,
                                       typename S::Wide eps, typename S::Wide lo,
                                       typename S::Wide hi) {
  typedef typename S::Wide T;
  // 24 bits, which float32 holds exactly: a multiple of 2^-23 in [-1, 1).
  const T u = static_cast<T>(word >> 8) * static_cast<T>(1.0 / 8388608) - 1;
  return S::narrow(at_most(at_least(S::widen(origin) + eps * u, lo), hi));
}

// A thread makes the kGroup numbers of whole counters.
template <typename S, int kCount>
__global__ void linf_start_kernel(typename S::Element* x, const typename S::Element* origin,
                                  int64_t count, bool vector, uint64_t seed, typename S::Wide eps,
                                  typename S::Wide lo, typename S::Wide hi) {
  constexpr int kGroup = kCount > 4 ? kCount : 4;
  const int64_t groups = (count + kGroup - 1) / kGroup;
  for (int64_t group = thread_index(); group < groups; group += thread_count()) {
    uint32_t words[kGroup];
    const int64_t first = group * kGroup;
    for (int c = 0; c < kGroup; c += 4) philox((first + c) / 4, seed, words + c);
    if (vector && first + kGroup <= count) {
      for (int at = 0; at < kGroup; at += kCount) {
        auto pack = load_pack<S, kCount>(origin + first + at);
        for (int k = 0; k < kCount; ++k) {
          pack.at[k] = started<S>(pack.at[k], words[at + k], eps, lo, hi);
        }
        store_pack<S, kCount>(x + first + at, pack);
      }
      continue;
    }
    for (int k = 0; k < kGroup && first + k < count; ++k) {
      x[first + k] = started<S>(origin[first + k], words[k], eps, lo, hi);
    }
  }
}

template <typename S>
int launch(void* x, const void* origin, int64_t count, double eps, int64_t seed, double lo,
           double hi, cudaStream_t stream) {
  typedef typename S::Element E;
  typedef typename S::Wide T;
  constexpr int kThreads = 256, kCount = pack_size<S>();
  WCMI_LAUNCH((linf_start_kernel<S, kCount>), blocks_for(ceil_div(count, 4), kThreads), kThreads, 0,
              stream, static_cast<E*>(x), static_cast<const E*>(origin), count,
              aligned(x) && aligned(origin), static_cast<uint64_t>(seed), static_cast<T>(eps),
              static_cast<T>(lo), static_cast<T>(hi));
  return cudaGetLastError();
}

}  // namespace

int linf_start_cuda(void* x, const void* origin, int64_t count, int dtype, double eps, int64_t seed,
                    double lo, double hi, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (count == 0) return cudaSuccess;
  return for_storage(dtype, [=](auto storage) {
    return launch<decltype(storage)>(x, origin, count, eps, seed, lo, hi,
                                     static_cast<cudaStream_t>(stream));
  });
}

}  // namespace wcmi
