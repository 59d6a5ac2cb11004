// Which instruction sets this binary holds and this processor runs, best last; and their kernels.
#pragma once

#include "../kernels.h"

namespace wcmi {

struct SimdLevel {
  const char* name;
  CpuKernels kernels;
};

// Fills `levels` (room for three) with the levels that run here; returns how many.
int supported_levels(SimdLevel* levels);

}  // namespace wcmi
