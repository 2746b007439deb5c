// Every kernel, in the namespace of one instruction set; for avx512bf16.cpp, avx512.cpp, avx2.cpp and portable.cpp.
#include "aggregate.cpp"
#include "ceilings.cpp"
#include "cross.cpp"
#include "label.cpp"
#include "merge.cpp"

const diffseg::Kernels diffseg::DIFFSEG_ISA::table = {
    aggregate, aggregate_maps, merge, label, renumber, aggregate_cross, score_masks, divergences, multiply_adds, exponentials};
