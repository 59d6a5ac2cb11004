#define WCMI_LEVEL base
#include "l2_step-inl.h"
