// Storage types: how an element is widened to the type that its arithmetic is done in, and
// narrowed, as torch rounds it; and runs of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#include "../kernels.h"
#include "cuda_check.h"
#include "launch.h"

namespace wcmi {

struct Float32 {
  typedef float Element;
  typedef float Wide;
  static __host__ __device__ Wide widen(Element x) { return x; }
  static __host__ __device__ Element narrow(Wide x) { return x; }
};

struct Float64 {
  typedef double Element;
  typedef double Wide;
  static __host__ __device__ Wide widen(Element x) { return x; }
  static __host__ __device__ Element narrow(Wide x) { return x; }
};

struct BFloat16 {
  typedef __nv_bfloat16 Element;
  typedef float Wide;
  static __host__ __device__ Wide widen(Element x) { return __bfloat162float(x); }
  static __host__ __device__ Element narrow(Wide x) { return __float2bfloat16_rn(x); }
};

struct Float16 {
  typedef __half Element;
  typedef float Wide;
  static __host__ __device__ Wide widen(Element x) { return __half2float(x); }
  static __host__ __device__ Element narrow(Wide x) { return __float2half_rn(x); }
};

template <typename S>
__host__ __device__ typename S::Wide rounded(typename S::Wide x) {
  return S::widen(S::narrow(x));
}

// Calls `launch` with the storage type of `dtype`, as a value of its type.
template <typename Launch>
int for_storage(int dtype, Launch launch) {
  switch (dtype) {
    case kFloat32:
      return launch(Float32());
    case kFloat64:
      return launch(Float64());
    case kBFloat16:
      return launch(BFloat16());
    case kFloat16:
      return launch(Float16());
  }
  return cudaErrorInvalidValue;
}

// So many elements fill 16 bytes, the widest access there is.
template <typename S>
constexpr int pack_size() {
  return 16 / static_cast<int>(sizeof(typename S::Element));
}

template <typename S, int kCount>
struct alignas(kCount * sizeof(typename S::Element)) Pack {
  typename S::Element at[kCount];
};

template <typename S, int kCount>
__device__ Pack<S, kCount> load_pack(const typename S::Element* from) {
  return *reinterpret_cast<const Pack<S, kCount>*>(from);
}

template <typename S, int kCount>
__device__ void store_pack(typename S::Element* to, const Pack<S, kCount>& pack) {
  *reinterpret_cast<Pack<S, kCount>*>(to) = pack;
}

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Clamps that keep a NaN, whether in x or in the bound.
template <typename T>
__device__ T at_least(T x, T bound) {
  return x < bound || bound != bound ? bound : x;
}

template <typename T>
__device__ T at_most(T x, T bound) {
  return x > bound || bound != bound ? bound : x;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for `work` threads' worth: more than fill a GPU gain nothing, kernels stride over the
// rest.
inline unsigned blocks_for(int64_t work, int threads) {
  constexpr int64_t kMaxBlocks = 4096;
  const int64_t wanted = ceil_div(work, threads);
  return static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
}

__device__ inline int64_t thread_index() {
  return blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
}

__device__ inline int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

}  // namespace wcmi
