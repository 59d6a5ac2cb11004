// CUDA form of linf_step; see kernels.h for what it computes. Built with --fmad=false, so that
// every operation rounds as torch's does.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../kernels.h"
#include "cuda_check.h"

namespace wcmi {
namespace {

struct Float32 {
  typedef float Element;
  typedef float Wide;
  static __device__ Wide widen(Element x) { return x; }
  static __device__ Element narrow(Wide x) { return x; }
};

struct Float64 {
  typedef double Element;
  typedef double Wide;
  static __device__ Wide widen(Element x) { return x; }
  static __device__ Element narrow(Wide x) { return x; }
};

struct BFloat16 {
  typedef __nv_bfloat16 Element;
  typedef float Wide;
  static __device__ Wide widen(Element x) { return __bfloat162float(x); }
  static __device__ Element narrow(Wide x) { return __float2bfloat16_rn(x); }
};

struct Float16 {
  typedef __half Element;
  typedef float Wide;
  static __device__ Wide widen(Element x) { return __half2float(x); }
  static __device__ Element narrow(Wide x) { return __float2half_rn(x); }
};

template <typename S>
__device__ typename S::Wide rounded(typename S::Wide x) {
  return S::widen(S::narrow(x));
}

template <typename T>
__device__ T at_least(T x, T bound) {
  return x < bound || bound != bound ? bound : x;
}

template <typename T>
__device__ T at_most(T x, T bound) {
  return x > bound || bound != bound ? bound : x;
}

template <typename S>
__global__ void linf_step_kernel(typename S::Element* x, const typename S::Element* grad,
                                 const typename S::Element* origin, int64_t count,
                                 typename S::Wide eps, typename S::Wide step_size,
                                 typename S::Wide lower, typename S::Wide upper) {
  typedef typename S::Wide T;
  const T lo = rounded<S>(lower), hi = rounded<S>(upper);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += stride) {
    const T g = S::widen(grad[i]);
    if (g != g) continue;
    const T centre = S::widen(origin[i]);
    const T sign = static_cast<T>(g > 0) - static_cast<T>(g < 0);
    T moved = rounded<S>(S::widen(x[i]) + rounded<S>(sign * step_size));
    moved = at_least(moved, rounded<S>(centre - eps));
    moved = at_most(moved, rounded<S>(centre + eps));
    x[i] = S::narrow(at_most(at_least(moved, lo), hi));
  }
}

template <typename S>
cudaError_t launch(void* x, const void* grad, const void* origin, int64_t count, double eps,
                   double step_size, double lo, double hi, cudaStream_t stream) {
  typedef typename S::Element E;
  typedef typename S::Wide T;
  constexpr int kThreads = 256;
  constexpr int64_t kMaxBlocks = 4096;
  const int64_t wanted = (count + kThreads - 1) / kThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  // clang-format off: it takes the chevrons of a template's launch for operators.
  linf_step_kernel<S><<<blocks, kThreads, 0, stream>>>(
      static_cast<E*>(x), static_cast<const E*>(grad), static_cast<const E*>(origin), count,
      static_cast<T>(eps), static_cast<T>(step_size), static_cast<T>(lo), static_cast<T>(hi));
  // clang-format on
  return cudaGetLastError();
}

}  // namespace

int linf_step_cuda(void* x, const void* grad, const void* origin, int64_t count, int dtype,
                   double eps, double step_size, double lo, double hi, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  if (count == 0) return cudaSuccess;
  const cudaStream_t queue = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case kFloat32:
      return launch<Float32>(x, grad, origin, count, eps, step_size, lo, hi, queue);
    case kFloat64:
      return launch<Float64>(x, grad, origin, count, eps, step_size, lo, hi, queue);
    case kBFloat16:
      return launch<BFloat16>(x, grad, origin, count, eps, step_size, lo, hi, queue);
    case kFloat16:
      return launch<Float16>(x, grad, origin, count, eps, step_size, lo, hi, queue);
  }
  return cudaErrorInvalidValue;
}

const char* cuda_error_text(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

}  // namespace wcmi
