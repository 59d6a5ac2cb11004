#define WCMI_LEVEL avx2
#include "l2_step-inl.h"
