// Which of the compiled instruction sets this machine has.

#include <cstring>

#include "kernels.h"

namespace diffseg {

const Kernels* kernels(const char* isa) {
#ifdef DIFFSEG_X86
    __builtin_cpu_init();
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("fma");
#ifdef DIFFSEG_AVX512BF16
    if (std::strcmp(isa, "avx512bf16") == 0)
        return has_avx512 && __builtin_cpu_supports("avx512bf16") ? &avx512bf16::table : nullptr;
#endif
    if (std::strcmp(isa, "avx512") == 0) return has_avx512 ? &avx512::table : nullptr;
    if (std::strcmp(isa, "avx2") == 0)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &avx2::table : nullptr;
#endif
    return std::strcmp(isa, "portable") == 0 ? &portable::table : nullptr;
}

bool bfloat16_first() {
#ifdef DIFFSEG_X86
    __builtin_cpu_init();
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

}  // namespace diffseg
