#define WCMI_LEVEL base
#include "linf_step-inl.h"
