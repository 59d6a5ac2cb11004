#define WCMI_LEVEL avx512
#include "linf_step-inl.h"
