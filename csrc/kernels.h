// The C interface of every kernel: raw pointers, int64 sizes and, on GPUs, a stream. Nothing here
// or behind it knows torch or Python.
#pragma once

#include <stdint.h>

namespace wcmi {

enum DType { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// critic_stats -- reductions over tiles of the score matrix T. A tile holds the scores of `rows`
// representations, the first being `first_row`, against `images` images, the first being
// `first_image`, at all P locations: scores[r * images * P + (j - first_image) * P + p] is
// T[first_row + r, j, p] = <z[i], h[j, p]>. Each row is reduced by one thread in a fixed order:
// results do not depend on `threads`.
template <typename T>
struct CriticStatsTile {
  const T* scores;
  int64_t first_row, rows, first_image, images, P;
};

// Statistics of T, or gradients of them, each (N, P) and over the images j != i; null where not
// asked for. lse: log-sum-exp of T[i, j, p]; clamped_lse: the same of T clamped to [-tau, tau],
// without gradient; softplus, sum: of softplus(T) and T; square: of (|T| + 1)^2 / 2. positives:
// T[i, i, p]. row_max: the running maximum.
template <typename T>
struct CriticStatsArrays {
  T *positives, *row_max, *lse, *softplus, *clamped_lse, *sum, *square;
};

// fwd: adds a tile to the arrays, or writes them where first_image is 0. The log-sum-exps hold sums
//   relative to row_max until they are finished.
// finish: turns the first `count` entries of both log-sum-exps into what they are named.
// bwd: grad = the gradient of the tile's scores, for the gradients `d` of the statistics; `lse` may
//   be null where d.lse is.
// workspace: critic_stats_workspace(P) elements for each thread.
// dv_value: value = mean(positives) - mean over p of L[p] + log(N (N - 1)), where L is the
//   log-sum-exp of lse (N, P) over i, with zero_diagonal of N zeros more; dlse = the gradient.
template <typename T>
struct CriticStatsKernels {
  void (*fwd)(const CriticStatsTile<T>& tile, const CriticStatsArrays<T>& out, double tau,
              T* workspace, int threads);
  void (*finish)(const CriticStatsArrays<T>& out, int64_t count, double tau, int threads);
  void (*dv_value)(const T* positives, const T* lse, int64_t N, int64_t P, bool zero_diagonal,
                   T* value, T* dlse);
  void (*bwd)(const CriticStatsTile<T>& tile, const T* lse, const CriticStatsArrays<T>& d, T* grad,
              T* workspace, int threads);
};
static constexpr int64_t critic_stats_workspace(int64_t P) { return 6 * (P + 96); }

// critic_tail -- the layer normalisation, without scale and shift, at the end of the critic's 1x1
// block, on `count` rows of U columns that lie `stride` apart.
// fwd: row <- (v - mean(v)) * rstd for v = row + bias, and rstd = 1 / sqrt(var(v) + eps); columns
//   from U to `stride` become 1, 0, 0, ...: a product with features finds its constant there.
// bwd: out (count, U) = the gradient of v, for the gradient `d` of the rows that fwd made.
template <typename T>
struct CriticTailKernels {
  void (*fwd)(T* rows, int64_t stride, int64_t count, int64_t U, const T* bias, double eps, T* rstd,
              int threads);
  void (*bwd)(const T* d, const T* rows, int64_t stride, int64_t count, int64_t U, const T* rstd,
              T* out, int threads);
};

// linf_step -- x <- clip(clip(x + step_size sgn(grad), origin - eps, origin + eps), lo, hi), each
//   operation rounded to the storage type as torch rounds it. A pixel whose grad is NaN is left.
// linf_start -- x <- clip(origin + eps u, lo, hi), computed in float, or double for double, then
//   rounded. u is uniform in [-1, 1): for element i the upper 24
//   bits of word i % 4 of Philox4x32-10 with counter i / 4 and key `seed`. x may be origin.
// l2_step -- for each of `rows` rows of `size` elements: x <- x + step_size grad / |grad|, put on
//   the ball of radius eps around origin where it is outside, then clipped to [lo, hi]. A row of
//   zero gradients does not move, one with a NaN is left. Each row is reduced by one thread in a
//   fixed order: results do not depend on `threads` or the level.
// keep_best -- for each of `rows` rows of `row_bytes` bytes whose value is greater than best_value,
//   or is a number where best_value is NaN: best_x <- x, best_value <- value.
struct CpuKernels {
  CriticStatsKernels<float> critic_stats_f32;
  CriticStatsKernels<double> critic_stats_f64;
  CriticTailKernels<float> critic_tail_f32;
  CriticTailKernels<double> critic_tail_f64;
  void (*linf_step)(void* x, const void* grad, const void* origin, int64_t count, int dtype,
                    double eps, double step_size, double lo, double hi, int threads);
  void (*linf_start)(void* x, const void* origin, int64_t count, int dtype, double eps,
                     int64_t seed, double lo, double hi, int threads);
  void (*l2_step)(void* x, const void* grad, const void* origin, int64_t rows, int64_t size,
                  int dtype, double eps, double step_size, double lo, double hi, int threads);
  void (*keep_best)(void* best_x, void* best_value, const void* x, const void* value, int64_t rows,
                    int64_t row_bytes, int value_dtype, int threads);
};

// One table per instruction set, filled by csrc/cpu/*_<level>.cpp.
#define WCMI_DECLARE_LEVEL(LEVEL)              \
  namespace LEVEL {                            \
  void fill_critic_stats(CpuKernels* kernels); \
  void fill_critic_tail(CpuKernels* kernels);  \
  void fill_linf_step(CpuKernels* kernels);    \
  void fill_linf_start(CpuKernels* kernels);   \
  void fill_l2_step(CpuKernels* kernels);      \
  void fill_keep_best(CpuKernels* kernels);    \
  }
WCMI_DECLARE_LEVEL(base)
WCMI_DECLARE_LEVEL(avx2)
WCMI_DECLARE_LEVEL(avx512)
#undef WCMI_DECLARE_LEVEL

// CUDA: addresses on `device`, work on `stream`; each returns a cudaError_t, 0 when launched.
// `stats` and `d` are contiguous (1 + S, N, P): the positives, and the S statistics of `which`, in
// the order of its bits (wcmi_fast/_ops.py), or their gradients; float, or double for double.
int critic_stats_fwd_cuda(const void* z, const void* h, int64_t N, int64_t P, int64_t U, int dtype,
                          int which, double tau, void* stats, int device, void* stream);
// dz and dh may be null; workspace: critic_stats_bwd_parts(N, P) N U sums, where dz is not.
int critic_stats_bwd_cuda(const void* d, const void* z, const void* h, const void* lse, int64_t N,
                          int64_t P, int64_t U, int dtype, int which, void* dz, void* dh,
                          void* workspace, int device, void* stream);
static constexpr int64_t critic_stats_bwd_parts(int64_t N, int64_t P) {
  const int64_t parts = N * P / 128;
  return parts < 1 ? 1 : (parts > 64 ? 64 : parts);
}
int score_stats_fwd_cuda(const void* scores, int64_t N, int64_t P, int dtype, int which, double tau,
                         void* stats, int device, void* stream);
int score_stats_bwd_cuda(const void* d, const void* scores, const void* lse, int64_t N, int64_t P,
                         int dtype, int which, void* dscores, int device, void* stream);
int dv_value_cuda(const void* positives, const void* lse, int64_t N, int64_t P, bool zero_diagonal,
                  int dtype, void* value, void* dlse, int device, void* stream);
int linf_step_cuda(void* x, const void* grad, const void* origin, int64_t count, int dtype,
                   double eps, double step_size, double lo, double hi, int device, void* stream);
int linf_start_cuda(void* x, const void* origin, int64_t count, int dtype, double eps, int64_t seed,
                    double lo, double hi, int device, void* stream);
int l2_step_cuda(void* x, const void* grad, const void* origin, int64_t rows, int64_t size,
                 int dtype, double eps, double step_size, double lo, double hi, int device,
                 void* stream);
int keep_best_cuda(void* best_x, void* best_value, const void* x, const void* value, int64_t rows,
                   int64_t row_bytes, int value_dtype, int device, void* stream);
const char* cuda_error_text(int error);

}  // namespace wcmi
