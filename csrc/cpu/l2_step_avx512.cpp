#define WCMI_LEVEL avx512
#include "l2_step-inl.h"
