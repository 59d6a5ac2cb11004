// CUDA form of dv_value; see kernels.h for what it computes. One block, in double and in a fixed
// order: there are only N P numbers.
#include "block_reduce.cuh"
#include "statistics.cuh"
#include "storage.cuh"

namespace wcmi {
namespace {

constexpr int kThreads = 256;

// The log-sum-exp over i of lse[i, p] for this thread's p, of which thread p % lanes has the
// result.
template <typename T>
__device__ double location_lse(const T* lse, int64_t N, int64_t P, int64_t p, bool zero_diagonal,
                               int lanes, int slots, Running<double>* states) {
  const int slot = threadIdx.x / lanes;
  Running<double> own = nothing<double>();
  for (int64_t i = slot; slot < slots && p < P && i < N; i += slots) {
    add_score(&own, static_cast<double>(lse[i * P + p]), 1.0, kLse);
  }
  merge_threads(&own, lanes, lanes * slots, 1.0, states);
  if (zero_diagonal) {
    raise(&own, 0.0, 1.0);
    own.lse += static_cast<double>(N) * exp(-shift_of(own.largest));
  }
  return shift_of(own.largest) + log(own.lse);
}

template <typename T>
__global__ void dv_value_kernel(const T* positives, const T* lse, int64_t N, int64_t P,
                                bool zero_diagonal, T* value, T* dlse) {
  WCMI_SHARED(Running<double>, states, kThreads);
  WCMI_SHARED(double, joint, kThreads);
  const int lanes = static_cast<int>(P < kThreads ? P : kThreads), slots = kThreads / lanes;
  const int lane = threadIdx.x % lanes, slot = threadIdx.x / lanes;
  double total = 0;
  for (int64_t k = threadIdx.x; k < N * P; k += kThreads) total += positives[k];
  total /= static_cast<double>(N);
  for (int64_t first = 0; first < P; first += lanes) {
    const int64_t p = first + lane;
    const double own = location_lse(lse, N, P, p, zero_diagonal, lanes, slots, states);
    if (threadIdx.x < lanes) joint[lane] = own;
    __syncthreads();
    for (int64_t i = slot; slot < slots && p < P && i < N; i += slots) {
      // Where every score is -inf the weight is 0 and not exp(-inf + inf).
      const double x = lse[i * P + p];
      dlse[i * P + p] = x == -INFINITY ? T(0) : static_cast<T>(-exp(x - joint[lane]) / P);
    }
    if (slot == 0 && p < P) total -= own;
    __syncthreads();
  }
  total = block_reduce(total, joint, Sum<double>());
  if (threadIdx.x == 0) *value = static_cast<T>(total / P + log(static_cast<double>(N) * (N - 1)));
}

template <typename T>
int launch(const void* positives, const void* lse, int64_t N, int64_t P, bool zero_diagonal,
           void* value, void* dlse, cudaStream_t stream) {
  WCMI_LAUNCH((dv_value_kernel<T>), 1, kThreads, 0, stream, static_cast<const T*>(positives),
              static_cast<const T*>(lse), N, P, zero_diagonal, static_cast<T*>(value),
              static_cast<T*>(dlse));
  return cudaGetLastError();
}

}  // namespace

int dv_value_cuda(const void* positives, const void* lse, int64_t N, int64_t P, bool zero_diagonal,
                  int dtype, void* value, void* dlse, int device, void* stream) {
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();
  const auto typed = dtype == kFloat64 ? launch<double> : launch<float>;
  return typed(positives, lse, N, P, zero_diagonal, value, dlse, static_cast<cudaStream_t>(stream));
}

}  // namespace wcmi
