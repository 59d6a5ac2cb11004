#include "simd_level.h"

namespace wcmi {

#if defined(__x86_64__)
// The builtin reads CPUID and asks the operating system, by XGETBV, whether it saves the registers.
static bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

int supported_levels(SimdLevel* levels) {
  int count = 0;
  levels[count].name = "base";
  base::fill_critic_stats(&levels[count].kernels);
  base::fill_critic_tail(&levels[count].kernels);
  base::fill_linf_step(&levels[count].kernels);
  base::fill_linf_start(&levels[count].kernels);
  base::fill_l2_step(&levels[count].kernels);
  base::fill_keep_best(&levels[count++].kernels);
#if defined(__x86_64__)
  if (has_avx2()) {
    levels[count].name = "avx2";
    avx2::fill_critic_stats(&levels[count].kernels);
    avx2::fill_critic_tail(&levels[count].kernels);
    avx2::fill_linf_step(&levels[count].kernels);
    avx2::fill_linf_start(&levels[count].kernels);
    avx2::fill_l2_step(&levels[count].kernels);
    avx2::fill_keep_best(&levels[count++].kernels);
  }
  if (has_avx512()) {
    levels[count].name = "avx512";
    avx512::fill_critic_stats(&levels[count].kernels);
    avx512::fill_critic_tail(&levels[count].kernels);
    avx512::fill_linf_step(&levels[count].kernels);
    avx512::fill_linf_start(&levels[count].kernels);
    avx512::fill_l2_step(&levels[count].kernels);
    avx512::fill_keep_best(&levels[count++].kernels);
  }
#endif
  return count;
}

}  // namespace wcmi
