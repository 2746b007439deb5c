// The kernels for one instruction set; setup.py gives this file its flags.
#define DIFFSEG_ISA avx512
#include "table.h"
