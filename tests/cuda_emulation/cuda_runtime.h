// Stands in for CUDA's header of the same name where g++ compiles csrc/cuda for the CPU: the parts
// of CUDA C++ that kernels use, on the fibres of scheduler.h. Types and the declarations of the
// runtime are CUDA's own.
#pragma once

#include <cuda_runtime_api.h>
#include <math.h>
#include <string.h>
#include <vector_functions.h>

#include <tuple>
#include <type_traits>

#include "scheduler.h"

// ---- launches and shared arrays -----------------------------------------------------------------

#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static_assert(false, "shared arrays are declared by WCMI_SHARED");

#define threadIdx (::wcmi_emulation::place->thread)
#define blockIdx (::wcmi_emulation::place->block)
#define blockDim (::wcmi_emulation::place->block_dim)
#define gridDim (::wcmi_emulation::place->grid_dim)
constexpr int warpSize = 32;

#define WCMI_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)           \
  ::wcmi_emulation::launch_kernel(#kernel, grid, block, shared_bytes, stream, \
                                  (kernel), ##__VA_ARGS__)
#define WCMI_SHARED(type, name, count)                                      \
  static char name##_key;                                                   \
  auto& name = *static_cast<type(*)[count]>(::wcmi_emulation::shared_array( \
      &name##_key, sizeof(type) * static_cast<size_t>(count), alignof(type)))
#define WCMI_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(::wcmi_emulation::dynamic_shared())

namespace wcmi_emulation {

constexpr size_t kMaxArgumentBytes = 4096;

template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, dim3 grid, dim3 block, size_t dynamic_shared,
                   cudaStream_t stream, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, std::tuple<Parameters...>(static_cast<Arguments&&>(arguments)...)};
  static_assert(sizeof(call.arguments) <= kMaxArgumentBytes, "CUDA takes 4096 bytes of arguments");
  const auto run_thread = [](void* raw) {
    const Call& call = *static_cast<const Call*>(raw);
    std::apply(call.kernel, call.arguments);
  };
  launch({name, grid, block, dynamic_shared, stream, run_thread, &call});
}

}  // namespace wcmi_emulation

// ---- barriers and warps -------------------------------------------------------------------------

inline void __syncthreads(wcmi_emulation::Site site = {}) {
  wcmi_emulation::barrier(false, "__syncthreads", site);
}
inline int __syncthreads_count(int predicate, wcmi_emulation::Site site = {}) {
  return wcmi_emulation::barrier(predicate != 0, "__syncthreads_count", site);
}
inline int __syncthreads_or(int predicate, wcmi_emulation::Site site = {}) {
  return wcmi_emulation::barrier(predicate != 0, "__syncthreads_or", site) != 0;
}
inline int __syncthreads_and(int predicate, wcmi_emulation::Site site = {}) {
  return wcmi_emulation::barrier(predicate == 0, "__syncthreads_and", site) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffff, wcmi_emulation::Site site = {}) {
  wcmi_emulation::warp(wcmi_emulation::WarpOperation::kSync, "__syncwarp", mask, 0, 0, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, wcmi_emulation::Site site = {}) {
  return static_cast<unsigned>(wcmi_emulation::warp(
      wcmi_emulation::WarpOperation::kBallot, "__ballot_sync", mask, predicate != 0, 0, site));
}
inline int __any_sync(unsigned mask, int predicate, wcmi_emulation::Site site = {}) {
  return wcmi_emulation::warp(wcmi_emulation::WarpOperation::kBallot, "__any_sync", mask,
                              predicate != 0, 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, wcmi_emulation::Site site = {}) {
  return wcmi_emulation::warp(wcmi_emulation::WarpOperation::kBallot, "__all_sync", mask,
                              predicate == 0, 0, site) == 0;
}
// Hardware may run the lanes of a warp apart at any time: alone is all that a lane can rely on.
inline unsigned __activemask() { return 1u << wcmi_emulation::lane(); }

namespace wcmi_emulation {

template <class T>
T shuffle(const char* name, unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp(WarpOperation::kShuffle, name, mask, bits, source, site);
  memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

inline int first_lane(int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("a shuffle's width is a power of two up to 32", site);
  }
  return lane() & ~(width - 1);
}

}  // namespace wcmi_emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, wcmi_emulation::Site site = {}) {
  const int first = wcmi_emulation::first_lane(width, site);
  return wcmi_emulation::shuffle("__shfl_sync", mask, value, first + (source & (width - 1)), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 wcmi_emulation::Site site = {}) {
  const int own = wcmi_emulation::lane(), source = own - static_cast<int>(delta);
  const bool inside = source >= wcmi_emulation::first_lane(width, site);
  return wcmi_emulation::shuffle("__shfl_up_sync", mask, value, inside ? source : own, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   wcmi_emulation::Site site = {}) {
  const int own = wcmi_emulation::lane(), source = own + static_cast<int>(delta);
  const bool inside = source < wcmi_emulation::first_lane(width, site) + width;
  return wcmi_emulation::shuffle("__shfl_down_sync", mask, value, inside ? source : own, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  wcmi_emulation::Site site = {}) {
  const int own = wcmi_emulation::lane(), source = own ^ bits;
  const bool inside = source < wcmi_emulation::first_lane(width, site) + width;
  return wcmi_emulation::shuffle("__shfl_xor_sync", mask, value, inside ? source : own, site);
}

// ---- atomics and memory -------------------------------------------------------------------------

namespace wcmi_emulation {

template <class T, class Change>
T change_atomically(T* address, Change change) {
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = change(before);
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED,
                                      __ATOMIC_RELAXED));
  return before;
}

}  // namespace wcmi_emulation

template <class T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return wcmi_emulation::change_atomically(address, [=](T x) { return static_cast<T>(x + value); });
}
template <class T>
T atomicMax(T* address, std::common_type_t<T> value) {
  return wcmi_emulation::change_atomically(address, [=](T x) { return x < value ? value : x; });
}
template <class T>
T atomicMin(T* address, std::common_type_t<T> value) {
  return wcmi_emulation::change_atomically(address, [=](T x) { return value < x ? value : x; });
}
template <class T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return wcmi_emulation::change_atomically(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::common_type_t<T> compare, std::common_type_t<T> value) {
  return wcmi_emulation::change_atomically(address, [=](T x) { return x == compare ? value : x; });
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
inline void __threadfence() { wcmi_emulation::memory_fence(); }

template <class Function>
cudaError_t cudaFuncSetAttribute(Function* function, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(function), attribute, value);
}

// ---- arithmetic ---------------------------------------------------------------------------------

template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
  typedef std::common_type_t<A, B> T;
  if constexpr (std::is_floating_point_v<T>) return fmin(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(b) < static_cast<T>(a) ? b : a;
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
  typedef std::common_type_t<A, B> T;
  if constexpr (std::is_floating_point_v<T>) return fmax(static_cast<T>(a), static_cast<T>(b));
  return static_cast<T>(a) < static_cast<T>(b) ? b : a;
}

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

// ---- what CUDA's half types lack outside nvcc ---------------------------------------------------

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// The product of two half numbers is exact in double, and so is its sum with a third unless they
// are far apart, where the lower one cannot reach a tie.
inline __half __hfma(__half a, __half b, __half c) {
  return __double2half(fma(static_cast<double>(__half2float(a)),
                           static_cast<double>(__half2float(b)),
                           static_cast<double>(__half2float(c))));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return __halves2half2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}
