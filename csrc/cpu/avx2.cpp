// The kernels for one instruction set; setup.py gives this file its flags.
#define DIFFSEG_ISA avx2
#include "table.h"
