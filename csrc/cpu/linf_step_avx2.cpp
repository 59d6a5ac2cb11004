#define WCMI_LEVEL avx2
#include "linf_step-inl.h"
