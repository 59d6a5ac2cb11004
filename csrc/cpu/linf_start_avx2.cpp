#define WCMI_LEVEL avx2
#include "linf_start-inl.h"
