// The C interface of every kernel: raw pointers, int64 sizes and, on GPUs, a stream. Nothing here
// or behind it knows torch or Python.
#pragma once

#include <stdint.h>

namespace wcmi {

enum DType { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// critic_stats -- reductions over tiles of the score matrix T. A tile holds the scores of `images`
// consecutive images, `first` being the first, at all P locations against all N representations:
// row r = (j - first) * P + p, column i, so that tile[r * N + i] = T[i, j, p] = <z[i], h[j, p]>.
// Rows are reduced one by one, in a fixed order: results do not depend on `threads`.
//
// critic_stats_fwd: positives[j, p] = T[j, j, p]; row_max and row_sum [j, p] = the maximum m over
//   i != j and the sum of exp(T[i, j, p] - m) over i != j. The outputs are whole (N, P) arrays, of
//   which the tile's images are written. The tile's diagonal is overwritten with -inf.
// critic_stats_lse: lse[p] = log(sum over j of row_sum[j, p] exp(row_max[j, p])), plus, with
//   zero_diagonal, N terms exp(0): the authors' multiplicative mask.
// critic_stats_bwd: grad[r, i] = dlse[p] exp(tile[r, i] - lse[p]) for i != j, dpositives[j, p] for
//   i == j. `grad` may be `tile`.
//
// linf_step -- x <- clip(clip(x + step_size sgn(grad), origin - eps, origin + eps), lo, hi), each
//   operation rounded to the storage type as torch rounds it. A pixel whose grad is NaN is left.
struct CpuKernels {
  void (*critic_stats_fwd_f32)(float* tile, int64_t first, int64_t images, int64_t N, int64_t P,
                               float* positives, float* row_max, float* row_sum, int threads);
  void (*critic_stats_fwd_f64)(double* tile, int64_t first, int64_t images, int64_t N, int64_t P,
                               double* positives, double* row_max, double* row_sum, int threads);
  void (*critic_stats_lse_f32)(const float* row_max, const float* row_sum, int64_t N, int64_t P,
                               int zero_diagonal, float* lse);
  void (*critic_stats_lse_f64)(const double* row_max, const double* row_sum, int64_t N, int64_t P,
                               int zero_diagonal, double* lse);
  void (*critic_stats_bwd_f32)(const float* tile, int64_t first, int64_t images, int64_t N,
                               int64_t P, const float* lse, const float* dpositives,
                               const float* dlse, float* grad, int threads);
  void (*critic_stats_bwd_f64)(const double* tile, int64_t first, int64_t images, int64_t N,
                               int64_t P, const double* lse, const double* dpositives,
                               const double* dlse, double* grad, int threads);
  void (*linf_step)(void* x, const void* grad, const void* origin, int64_t count, int dtype,
                    double eps, double step_size, double lo, double hi, int threads);
};

// One table per instruction set, filled by csrc/cpu/*_<level>.cpp.
#define WCMI_DECLARE_LEVEL(LEVEL)              \
  namespace LEVEL {                            \
  void fill_critic_stats(CpuKernels* kernels); \
  void fill_linf_step(CpuKernels* kernels);    \
  }
WCMI_DECLARE_LEVEL(base)
WCMI_DECLARE_LEVEL(avx2)
WCMI_DECLARE_LEVEL(avx512)
#undef WCMI_DECLARE_LEVEL

// CUDA: the address of x, grad and origin on `device`; returns a cudaError_t, 0 when launched.
int linf_step_cuda(void* x, const void* grad, const void* origin, int64_t count, int dtype,
                   double eps, double step_size, double lo, double hi, int device, void* stream);
const char* cuda_error_text(int error);

}  // namespace wcmi
