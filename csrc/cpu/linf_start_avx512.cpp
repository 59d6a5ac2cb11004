#define WCMI_LEVEL avx512
#include "linf_start-inl.h"
