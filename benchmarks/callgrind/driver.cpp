// Runs one kernel once on fixed data, with AVX2 and one thread, for valgrind to count its
// instructions, and checks what it wrote against a plain loop in double.
//   driver             lists what the counts depend on (key=value) and the cases
//   driver <case>      runs one; exit code 1 if its result is wrong
// A new case is a function that sets up, calls `measured` and `expect`, and a line in `cases`.
#include <gnu/libc-version.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "../../csrc/kernels.h"

// Where valgrind counts: count.py gives it this name, which a specialised copy would not have.
extern "C" __attribute__((noipa)) void measured(const std::function<void()>& kernel) { kernel(); }

namespace {

constexpr int64_t N = 128, P = 64;  // T in one tile, as wcmi_fast keeps it at this size
constexpr int64_t kRows = 64, U = 2048, kStride = U + 16;
constexpr int64_t kPixels = 128 * 3 * 32 * 32;
constexpr double kTau = 2;

const wcmi::CpuKernels kernels = [] {
  wcmi::CpuKernels table{};
  wcmi::avx2::fill_critic_stats(&table);
  wcmi::avx2::fill_critic_tail(&table);
  wcmi::avx2::fill_linf_step(&table);
  wcmi::avx2::fill_linf_start(&table);
  wcmi::avx2::fill_l2_step(&table);
  wcmi::avx2::fill_keep_best(&table);
  return table;
}();

const auto& stats_kernels(float) { return kernels.critic_stats_f32; }
const auto& stats_kernels(double) { return kernels.critic_stats_f64; }
const auto& tail_kernels(float) { return kernels.critic_tail_f32; }
const auto& tail_kernels(double) { return kernels.critic_tail_f64; }

// Uniform in [low, high], the same numbers on every machine.
template <typename T>
std::vector<T> uniform(int64_t count, uint64_t seed, double low, double high) {
  std::vector<T> values(count);
  for (T& value : values) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    value = static_cast<T>(low + (high - low) * static_cast<double>(seed >> 11) * 0x1p-53);
  }
  return values;
}

void expect(double got, double want, double tolerance) {
  if (std::fabs(got - want) <= tolerance * (1 + std::fabs(want))) return;
  std::fprintf(stderr, "driver: the kernel gave %.17g, a plain loop %.17g\n", got, want);
  std::exit(1);
}

template <typename T>
void expect(double got, double want) {
  expect(got, want, sizeof(T) == 4 ? 1e-5 : 1e-13);
}

// ---- critic_stats ------------------------------------------------------------------------------
// The five statistics, or gradients of them, and T; those that are not asked for stay empty.
template <typename T>
struct Statistics {
  std::vector<T> positives, row_max, lse, softplus, clamped_lse, sum, square;

  explicit Statistics(bool all)
      : positives(uniform<T>(N * P, 1, -1, 1)), row_max(N * P), lse(uniform<T>(N * P, 2, -1, 1)) {
    if (!all) return;
    softplus = uniform<T>(N * P, 3, -1, 1);
    clamped_lse.resize(N * P);
    sum = uniform<T>(N * P, 4, -1, 1);
    square = uniform<T>(N * P, 5, -1, 1);
  }

  wcmi::CriticStatsArrays<T> arrays() {
    const auto address = [](std::vector<T>& of) { return of.empty() ? nullptr : of.data(); };
    return {address(positives),   address(row_max), address(lse),   address(softplus),
            address(clamped_lse), address(sum),     address(square)};
  }
};

template <typename T>
std::vector<T> scores() {
  return uniform<T>(N * N * P, 6, -4, 4);
}

template <typename T>
wcmi::CriticStatsTile<T> one_tile(const std::vector<T>& of) {
  return {of.data(), 0, N, 0, N, P};
}

// Rows whose every location is checked: valgrind slows plain loops too.
constexpr int64_t kCheckedRows[] = {0, 1, 63, N - 1};

template <typename Check>
void for_checked(Check check) {
  for (const int64_t i : kCheckedRows) {
    for (int64_t p = 0; p < P; ++p) check(i, p);
  }
}

template <typename T>
void critic_stats_fwd(bool all) {
  const std::vector<T> t = scores<T>();
  Statistics<T> out(all);
  std::vector<T> workspace(wcmi::critic_stats_workspace(P));
  measured([&] {
    stats_kernels(T()).fwd(one_tile(t), out.arrays(), kTau, workspace.data(), 1);
    stats_kernels(T()).finish(out.arrays(), N * P, kTau, 1);
  });
  for_checked([&](int64_t i, int64_t p) {
    double exps = 0, clamped = 0, softplus = 0, sum = 0, square = 0;
    for (int64_t j = 0; j < N; ++j) {
      if (j == i) continue;
      const double x = t[(i * N + j) * P + p];
      exps += std::exp(x);
      clamped += std::exp(std::fmax(-kTau, std::fmin(kTau, x)));
      softplus += std::log1p(std::exp(x));
      sum += x;
      square += (std::fabs(x) + 1) * (std::fabs(x) + 1) / 2;
    }
    const int64_t at = i * P + p;
    expect<T>(out.positives[at], t[(i * N + i) * P + p]);
    expect<T>(out.lse[at], std::log(exps));
    if (!all) return;
    expect<T>(out.clamped_lse[at], std::log(clamped));
    expect<T>(out.softplus[at], softplus);
    expect<T>(out.sum[at], sum);
    expect<T>(out.square[at], square);
  });
}

template <typename T>
void critic_stats_bwd(bool all) {
  const std::vector<T> t = scores<T>();
  const std::vector<T> lse = uniform<T>(N * P, 7, 5, 6);
  Statistics<T> d(all);
  std::vector<T> grad(N * N * P), workspace(wcmi::critic_stats_workspace(P));
  measured([&] {
    stats_kernels(T()).bwd(one_tile(t), lse.data(), d.arrays(), grad.data(), workspace.data(), 1);
  });
  for_checked([&](int64_t i, int64_t p) {
    const int64_t at = i * P + p;
    for (int64_t j = 0; j < N; ++j) {
      const double x = t[(i * N + j) * P + p];
      double want = d.lse[at] * std::exp(x - lse[at]);
      if (all) {
        want += d.softplus[at] / (1 + std::exp(-x)) + d.sum[at];
        want += d.square[at] * (x + (x > 0) - (x < 0));
      }
      expect<T>(grad[(i * N + j) * P + p], j == i ? d.positives[at] : want);
    }
  });
}

template <typename T>
void dv_value() {
  const std::vector<T> positives = uniform<T>(N * P, 1, -1, 1), lse = uniform<T>(N * P, 2, 4, 6);
  std::vector<T> dlse(N * P);
  T value;
  measured([&] {
    stats_kernels(T()).dv_value(positives.data(), lse.data(), N, P, false, &value, dlse.data());
  });
  double want = std::log(static_cast<double>(N * (N - 1)));
  for (int64_t p = 0; p < P; ++p) {
    double exps = 0;
    for (int64_t i = 0; i < N; ++i) exps += std::exp(static_cast<double>(lse[i * P + p]));
    for (int64_t i = 0; i < N; ++i) {
      want += positives[i * P + p] / static_cast<double>(N * P);
      expect<T>(dlse[i * P + p], -std::exp(static_cast<double>(lse[i * P + p])) / exps / P);
    }
    want -= std::log(exps) / P;
  }
  expect<T>(value, want);
}

// ---- critic_tail -------------------------------------------------------------------------------
template <typename T>
void critic_tail_fwd() {
  const std::vector<T> v = uniform<T>(kRows * kStride, 1, -2, 3), bias = uniform<T>(U, 2, -1, 1);
  std::vector<T> rows = v, rstd(kRows);
  measured([&] {
    tail_kernels(T()).fwd(rows.data(), kStride, kRows, U, bias.data(), 1e-5, rstd.data(), 1);
  });
  for (int64_t r = 0; r < kRows; ++r) {
    const auto at = [&](int64_t c) { return static_cast<double>(v[r * kStride + c]) + bias[c]; };
    double mean = 0, variance = 0;
    for (int64_t c = 0; c < U; ++c) mean += at(c) / U;
    for (int64_t c = 0; c < U; ++c) variance += (at(c) - mean) * (at(c) - mean) / U;
    const double scale = 1 / std::sqrt(variance + 1e-5);
    expect<T>(rstd[r], scale);
    for (int64_t c = 0; c < U; ++c) expect<T>(rows[r * kStride + c], (at(c) - mean) * scale);
    for (int64_t c = U; c < kStride; ++c) expect<T>(rows[r * kStride + c], c == U);
  }
}

template <typename T>
void critic_tail_bwd() {
  const std::vector<T> rows = uniform<T>(kRows * kStride, 1, -2, 2);
  const std::vector<T> d = uniform<T>(kRows * kStride, 2, -1, 1), rstd = uniform<T>(kRows, 3, 1, 2);
  std::vector<T> out(kRows * U);
  measured([&] {
    tail_kernels(T()).bwd(d.data(), rows.data(), kStride, kRows, U, rstd.data(), out.data(), 1);
  });
  for (int64_t r = 0; r < kRows; ++r) {
    const T* x = rows.data() + r * kStride;
    const T* dx = d.data() + r * kStride;
    double mean = 0, product = 0;
    for (int64_t c = 0; c < U; ++c) mean += static_cast<double>(dx[c]) / U;
    for (int64_t c = 0; c < U; ++c) product += static_cast<double>(dx[c]) * x[c] / U;
    for (int64_t c = 0; c < U; ++c) {
      expect<T>(out[r * U + c], rstd[r] * (dx[c] - mean - x[c] * product));
    }
  }
}

// ---- linf_step ---------------------------------------------------------------------------------
// Images as float32 (float) and bfloat16 (uint16_t).
float widened(float x) { return x; }
float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
void narrow(float x, float* to) { *to = x; }
void narrow(float x, uint16_t* to) {  // towards zero: any fixed numbers will do
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  *to = static_cast<uint16_t>(bits >> 16);
}

template <typename E>
std::vector<E> stored(uint64_t seed, double low, double high) {
  const std::vector<float> values = uniform<float>(kPixels, seed, low, high);
  std::vector<E> result(kPixels);
  for (int64_t i = 0; i < kPixels; ++i) narrow(values[i], &result[i]);
  return result;
}

template <typename E>
void linf_step(wcmi::DType dtype) {
  constexpr double eps = 0.5, step = 0.0078125;
  const std::vector<E> origin = stored<E>(1, 0, 1), grad = stored<E>(2, -1, 1);
  const std::vector<E> before = stored<E>(3, 0, 1);
  std::vector<E> x = before;
  measured([&] {
    kernels.linf_step(x.data(), grad.data(), origin.data(), kPixels, dtype, eps, step, 0, 1, 1);
  });
  for (int64_t i = 0; i < kPixels; ++i) {
    const double centre = widened(origin[i]), g = widened(grad[i]);
    const double moved = widened(before[i]) + step * ((g > 0) - (g < 0));
    const double near = std::fmax(centre - eps, std::fmin(centre + eps, moved));
    expect(widened(x[i]), std::fmax(0, std::fmin(1, near)), sizeof(E) == 2 ? 0x1p-8 : 1e-6);
  }
}

// ---- linf_start, l2_step, keep_best ------------------------------------------------------------
constexpr int64_t kImages = 128, kImage = kPixels / kImages;

// Word i % 4 of Philox4x32-10 with counter i / 4.
uint32_t philox(uint64_t key, int64_t i) {
  uint32_t c[4] = {static_cast<uint32_t>(i / 4), 0, 0, 0};
  uint32_t k[2] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
        static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
    std::memcpy(c, next, sizeof(c));
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return c[i % 4];
}

void linf_start() {
  constexpr double eps = 0.25;
  const std::vector<float> origin = stored<float>(1, 0, 1);
  std::vector<float> x(kPixels);
  measured([&] {
    kernels.linf_start(x.data(), origin.data(), kPixels, wcmi::kFloat32, eps, 7, 0, 1, 1);
  });
  for (int64_t i = 0; i < kPixels; ++i) {
    const double moved = origin[i] + eps * ((philox(7, i) >> 8) * 0x1p-23 - 1);
    expect(x[i], std::fmax(0, std::fmin(1, moved)), 1e-6);
  }
}

double norm(const double* v) {
  double squares = 0;
  for (int64_t i = 0; i < kImage; ++i) squares += v[i] * v[i];
  return std::sqrt(squares);
}

void l2_step() {
  constexpr double eps = 12, step = 8;
  const std::vector<float> origin = stored<float>(1, 0, 1), grad = stored<float>(2, -1, 1);
  const std::vector<float> before = stored<float>(3, 0, 1);
  std::vector<float> x = before;
  measured([&] {
    kernels.l2_step(x.data(), grad.data(), origin.data(), kImages, kImage, wcmi::kFloat32, eps,
                    step, 0, 1, 1);
  });
  for (int64_t n = 0; n < kImages; ++n) {
    double g[kImage], offset[kImage];
    for (int64_t i = 0; i < kImage; ++i) g[i] = grad[n * kImage + i];
    const double size = norm(g);
    for (int64_t i = 0; i < kImage; ++i) {
      offset[i] = before[n * kImage + i] + step * g[i] / size - origin[n * kImage + i];
    }
    const double shrink = std::fmin(1, eps / norm(offset));
    for (int64_t i = 0; i < kImage; ++i) {
      const double moved = origin[n * kImage + i] + shrink * offset[i];
      expect(x[n * kImage + i], std::fmax(0, std::fmin(1, moved)), 1e-6);
    }
  }
}

void keep_best() {
  const std::vector<float> x = stored<float>(1, 0, 1), kept = stored<float>(2, 0, 1);
  std::vector<float> best_x = kept, value(kImages), best(kImages, 0.5f);
  for (int64_t n = 0; n < kImages; ++n) value[n] = n % 2 ? 1.0f : 0.0f;
  measured([&] {
    kernels.keep_best(best_x.data(), best.data(), x.data(), value.data(), kImages,
                      kImage * sizeof(float), wcmi::kFloat32, 1);
  });
  for (int64_t i = 0; i < kPixels; ++i) expect(best_x[i], i / kImage % 2 ? x[i] : kept[i], 0);
  for (int64_t n = 0; n < kImages; ++n) expect(best[n], n % 2 ? 1.0 : 0.5, 0);
}

struct Case {
  std::string name;
  std::function<void()> run;
};

const Case cases[] = {
    {"critic_stats_fwd lse float32", [] { critic_stats_fwd<float>(false); }},
    {"critic_stats_fwd lse float64", [] { critic_stats_fwd<double>(false); }},
    {"critic_stats_fwd all float32", [] { critic_stats_fwd<float>(true); }},
    {"critic_stats_bwd lse float32", [] { critic_stats_bwd<float>(false); }},
    {"critic_stats_bwd lse float64", [] { critic_stats_bwd<double>(false); }},
    {"critic_stats_bwd all float32", [] { critic_stats_bwd<float>(true); }},
    {"dv_value float32", dv_value<float>},
    {"critic_tail_fwd float32", critic_tail_fwd<float>},
    {"critic_tail_fwd float64", critic_tail_fwd<double>},
    {"critic_tail_bwd float32", critic_tail_bwd<float>},
    {"critic_tail_bwd float64", critic_tail_bwd<double>},
    {"linf_step float32", [] { linf_step<float>(wcmi::kFloat32); }},
    {"linf_step bfloat16", [] { linf_step<uint16_t>(wcmi::kBFloat16); }},
    {"linf_start float32", linf_start},
    {"l2_step float32", l2_step},
    {"keep_best float32", keep_best},
};

}  // namespace

int main(int argc, char** argv) {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::fprintf(stderr, "driver: this processor has no AVX2 and FMA\n");
    return 1;
  }
  if (argc == 1) {
    std::printf("compiler=%s\nlibc=%s\n", __VERSION__, gnu_get_libc_version());
    for (const Case& one : cases) std::printf("%s\n", one.name.c_str());
    return 0;
  }
  for (const Case& one : cases) {
    if (one.name == argv[1]) return one.run(), 0;
  }
  std::fprintf(stderr, "driver: no case is called %s\n", argv[1]);
  return 1;
}
