// The kernels for one instruction set; setup.py gives this file its flags.
#define DIFFSEG_ISA avx512bf16
#include "table.h"
