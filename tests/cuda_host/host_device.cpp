// See host_device.h.

#include "host_device.h"

#include <sys/mman.h>
#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif
#include <unistd.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace diffseg::cuda {

dim3 threadIdx, blockIdx, gridDim;

namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kLargestShared = 227 << 10;  // of an H100
constexpr int kPoison = 0xff;                 // NaN in every format

// Switching stacks: a few instructions where they are known here, else by a system call.
#ifdef __x86_64__
using Context = void*;
extern "C" void diffseg_switch_stack(void** save, void* load);
asm(R"(
.text
.globl diffseg_switch_stack
diffseg_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
void switch_to(Context& from, Context& to) { diffseg_switch_stack(&from, to); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + kStackBytes) - 8;  // six registers, the entry, and alignment
    top[6] = reinterpret_cast<void*>(entry);
    context = top;
}
#else
using Context = ucontext_t;
void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
}
#endif

enum class State { ready, at_barrier, in_warp, done };

struct Copy {
    unsigned char* target;
    const unsigned char* source;  // null: zeros
};

struct Fiber {
    Context context;
    State state;
    std::vector<Copy> copies;
    size_t committed;
};

struct Warp {
    const char* operation;
    int arrived;
    void* given[kLanes];
};

// Shared memory that ends where an unmapped page begins.
class Shared {
   public:
    Shared() {
        const size_t page = sysconf(_SC_PAGESIZE);
        size_ = (kLargestShared + page - 1) / page * page;
        void* memory = mmap(nullptr, size_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        memory_ = static_cast<unsigned char*>(memory);
        mprotect(memory_ + size_, page, PROT_NONE);
    }

    void start_block(size_t bytes) {
        if (bytes > kLargestShared) throw std::runtime_error("more shared memory than an H100 has");
        bytes = (bytes + 15) / 16 * 16;
        start_ = memory_ + size_ - bytes;
        std::memset(start_, kPoison, bytes);
    }
    unsigned char* start() const { return start_; }
    bool holds(const void* pointer) const {
        return pointer >= start_ && static_cast<const unsigned char*>(pointer) + 16 <= memory_ + size_;
    }

   private:
    unsigned char *memory_, *start_ = nullptr;
    size_t size_;
};

std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::unique_ptr<unsigned char[]> stacks;
size_t stack_count = 0;
Context scheduler;
const std::function<void()>* body;
size_t current;
std::string failure;
bool reversed = false, recording = false;
std::string launches;

Shared& shared() {
    static Shared memory;
    return memory;
}

Fiber& self() { return fibers[current]; }
Warp& own_warp() { return warps[current / kLanes]; }

void suspend(State state) {
    self().state = state;
    switch_to(self().context, scheduler);
}

void fail(const std::string& what) {
    failure = what;
    suspend(State::done);
}

void run_fiber() {
    (*body)();
    if (!self().copies.empty()) fail("a thread ended before its copies arrived");
    suspend(State::done);
}

void resume(size_t index) {
    current = index;
    threadIdx = dim3(static_cast<unsigned>(index));
    switch_to(scheduler, fibers[index].context);
    if (!failure.empty()) throw std::runtime_error(failure);
}

// Runs a warp until none of its lanes can go on.
void run_warp(size_t warp) {
    for (bool progress = true; progress;) {
        progress = false;
        for (int lane = 0; lane < kLanes; ++lane) {
            const size_t index = warp * kLanes + (reversed ? kLanes - 1 - lane : lane);
            if (fibers[index].state != State::ready) continue;
            resume(index);
            progress = true;
        }
    }
}

// Opens the barrier for all that wait at it; false where the block has ended.
bool open_barrier() {
    bool waiting = false;
    for (const Fiber& fiber : fibers) {
        if (fiber.state == State::in_warp) throw std::runtime_error("lanes of a warp do not meet");
        waiting |= fiber.state == State::at_barrier;
    }
    for (Fiber& fiber : fibers)
        if (fiber.state == State::at_barrier) fiber.state = State::ready;
    return waiting;
}

void run_block(int threads, size_t shared_bytes) {
    shared().start_block(shared_bytes);
    fibers.assign(threads, Fiber{});
    warps.assign(threads / kLanes, Warp{});
#ifdef __SANITIZE_ADDRESS__  // what earlier fibers left on their stacks
    __asan_unpoison_memory_region(stacks.get(), stack_count * kStackBytes);
#endif
    for (int index = 0; index < threads; ++index) prepare(fibers[index].context, &stacks[index * kStackBytes], run_fiber);
    do {
        for (size_t warp = 0; warp < warps.size(); ++warp) run_warp(reversed ? warps.size() - 1 - warp : warp);
    } while (open_barrier());
}

}  // namespace

namespace host {

void run(const char* kernel, dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& thread) {
    if (recording) {
        for (const auto& word : {std::string(kernel), std::to_string(grid.x), std::to_string(grid.y),
                                 std::to_string(grid.z), std::to_string(threads), std::to_string(shared_bytes)})
            launches += word + " ";
        launches += "\n";
        return;
    }
    if (stack_count < static_cast<size_t>(threads)) {
        stacks.reset(new unsigned char[threads * kStackBytes]);
        stack_count = threads;
    }
    body = &thread;
    gridDim = grid;
    failure.clear();
    try {
        for (unsigned z = 0; z < grid.z; ++z)
            for (unsigned y = 0; y < grid.y; ++y)
                for (unsigned x = 0; x < grid.x; ++x) {
                    blockIdx = dim3(x, y, z);
                    run_block(threads, shared_bytes);
                }
    } catch (const std::runtime_error& error) {
        throw std::runtime_error(std::string(kernel) + ": " + error.what());
    }
}

void diffseg_host_reverse(bool value) { reversed = value; }
void diffseg_host_record(bool value) {
    recording = value;
    if (value) launches.clear();
}
const char* diffseg_host_launches() { return launches.c_str(); }

void meet(const char* operation, void* given, void (*exchange)(void* const* all)) {
    Warp& warp = own_warp();
    if (warp.arrived > 0 && std::strcmp(warp.operation, operation) != 0)
        fail(std::string("lanes of a warp are at ") + warp.operation + " and " + operation);
    warp.operation = operation;
    warp.given[current % kLanes] = given;
    if (++warp.arrived < kLanes) {
        suspend(State::in_warp);
        return;
    }
    exchange(warp.given);
    warp.arrived = 0;
    for (size_t lane = 0, first = current / kLanes * kLanes; lane < kLanes; ++lane)
        if (fibers[first + lane].state == State::in_warp) fibers[first + lane].state = State::ready;
}

}  // namespace host

unsigned char* shared_memory() { return shared().start(); }

void sync_block() { suspend(State::at_barrier); }

namespace {

struct Shuffle {
    float value, result;
    int mask;
};
struct Broadcast {
    uint32_t value, result;
    int lane;
};
struct Ballot {
    bool bit;
    uint32_t result;
};

template <class T>
T& of(void* const* all, int lane) {
    return *static_cast<T*>(all[lane]);
}

}  // namespace

float shuffle_xor(float value, int mask) {
    Shuffle given = {value, 0, mask};
    host::meet("shuffle_xor", &given, [](void* const* all) {
        for (int lane = 0; lane < kLanes; ++lane)
            of<Shuffle>(all, lane).result = of<Shuffle>(all, lane ^ of<Shuffle>(all, lane).mask).value;
    });
    return given.result;
}

uint32_t broadcast(uint32_t value, int lane) {
    Broadcast given = {value, 0, lane};
    host::meet("broadcast", &given, [](void* const* all) {
        for (int to = 0; to < kLanes; ++to)
            of<Broadcast>(all, to).result = of<Broadcast>(all, of<Broadcast>(all, to).lane).value;
    });
    return given.result;
}

uint32_t ballot(bool bit) {
    Ballot given = {bit, 0};
    host::meet("ballot", &given, [](void* const* all) {
        uint32_t word = 0;
        for (int lane = 0; lane < kLanes; ++lane) word |= static_cast<uint32_t>(of<Ballot>(all, lane).bit) << lane;
        for (int lane = 0; lane < kLanes; ++lane) of<Ballot>(all, lane).result = word;
    });
    return given.result;
}

float exp2_approximate(float x) {
    const float result = std::exp2(x);
    return std::fpclassify(result) == FP_SUBNORMAL ? 0.0f : result;
}

float log_approximate(float x) {
    const float log = std::log2(x), error = std::ldexp(std::fmax(1.0f, std::fabs(log)), -22);
    return (to_bits(x) % 2 == 0 ? log + error : log - error) * 0.6931471805599453f;
}

namespace {

uint16_t round_float16(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
}

uint16_t round_bfloat16(float value) {
    if (std::isnan(value)) return 0x7fff;
    const uint32_t bits = to_bits(value);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float widen_float16(uint16_t bits) {
    _Float16 half;
    std::memcpy(&half, &bits, sizeof half);
    return static_cast<float>(half);
}

float widen_bfloat16(uint16_t bits) { return from_bits(static_cast<uint32_t>(bits) << 16); }

// Every float16 as float32: matrix products look their operands up.
const float* float16_values() {
    static const std::vector<float> values = [] {
        std::vector<float> all(1 << 16);
        for (int bits = 0; bits < 1 << 16; ++bits) all[bits] = widen_float16(static_cast<uint16_t>(bits));
        return all;
    }();
    return values.data();
}

}  // namespace

uint32_t pack_float16(float low, float high) {
    return round_float16(low) | static_cast<uint32_t>(round_float16(high)) << 16;
}

uint32_t pack_bfloat16(float low, float high) {
    return round_bfloat16(low) | static_cast<uint32_t>(round_bfloat16(high)) << 16;
}

float unpack_float16(uint16_t bits) { return float16_values()[bits]; }

namespace {

struct MatrixRow {
    uint32_t* out;
    const void* row;
};

void check_row(const void* row) {
    if (!shared().holds(row) || reinterpret_cast<uintptr_t>(row) % 16 != 0)
        fail("a matrix row is outside shared memory or not aligned to 16 bytes");
}

uint32_t element(void* const* all, int matrix, int row, int column) {
    return static_cast<const uint16_t*>(of<MatrixRow>(all, 8 * matrix + row).row)[column];
}

}  // namespace

void load_matrices(uint32_t (&out)[4], const void* row) {
    check_row(row);
    MatrixRow given = {out, row};
    host::meet("load_matrices", &given, [](void* const* all) {
        for (int lane = 0; lane < kLanes; ++lane)
            for (int m = 0; m < 4; ++m)
                of<MatrixRow>(all, lane).out[m] =
                    element(all, m, lane / 4, lane % 4 * 2) | element(all, m, lane / 4, lane % 4 * 2 + 1) << 16;
    });
}

void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
    check_row(row);
    MatrixRow given = {out, row};
    host::meet("load_matrices_transposed", &given, [](void* const* all) {
        for (int lane = 0; lane < kLanes; ++lane)
            for (int m = 0; m < 4; ++m)
                of<MatrixRow>(all, lane).out[m] =
                    element(all, m, lane % 4 * 2, lane / 4) | element(all, m, lane % 4 * 2 + 1, lane / 4) << 16;
    });
}

namespace {

struct Product {
    float* sum;
    const uint32_t* a;
    uint32_t b[2];
};

float truncated(double value) {
    const float rounded = static_cast<float>(value);
    return std::isfinite(rounded) && std::fabs(static_cast<double>(rounded)) > std::fabs(value)
               ? std::nextafter(rounded, 0.0f)
               : rounded;
}

// sum += a b for operands [16, K] and [K, 8] that have been put in order.
template <int K>
void accumulate(void* const* all, const float (&a)[16][K], const float (&b)[8][K]) {
    for (int lane = 0; lane < kLanes; ++lane)
        for (int c = 0; c < 4; ++c) {
            const int row = lane / 4 + c / 2 * 8, column = lane % 4 * 2 + c % 2;
            float& sum = of<Product>(all, lane).sum[c];
            double total = sum;
            for (int k = 0; k < K; ++k) total += static_cast<double>(a[row][k]) * b[column][k];
            sum = truncated(total);
        }
}

template <class Widen>
void multiply_16_bits(void* const* all, Widen widen) {
    float a[16][16], b[8][16];
    for (int lane = 0; lane < kLanes; ++lane) {
        const Product& given = of<Product>(all, lane);
        const int group = lane / 4, k = lane % 4 * 2;
        for (int i = 0; i < 2; ++i) {
            const auto part = [&](uint32_t word) { return widen(static_cast<uint16_t>(word >> 16 * i)); };
            a[group][k + i] = part(given.a[0]), a[group + 8][k + i] = part(given.a[1]);
            a[group][k + 8 + i] = part(given.a[2]), a[group + 8][k + 8 + i] = part(given.a[3]);
            b[group][k + i] = part(given.b[0]), b[group][k + 8 + i] = part(given.b[1]);
        }
    }
    accumulate(all, a, b);
}

}  // namespace

void multiply_float16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product given = {sum, a, {b0, b1}};
    host::meet("multiply_float16", &given, [](void* const* all) { multiply_16_bits(all, unpack_float16); });
}

void multiply_bfloat16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product given = {sum, a, {b0, b1}};
    host::meet("multiply_bfloat16", &given, [](void* const* all) { multiply_16_bits(all, widen_bfloat16); });
}

void multiply_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product given = {sum, a, {b0, b1}};
    host::meet("multiply_tf32", &given, [](void* const* all) {
        const auto value = [](uint32_t bits) { return from_bits(bits & 0xffffe000u); };
        float a[16][8], b[8][8];
        for (int lane = 0; lane < kLanes; ++lane) {
            const Product& given = of<Product>(all, lane);
            const int group = lane / 4, k = lane % 4;
            a[group][k] = value(given.a[0]), a[group + 8][k] = value(given.a[1]);
            a[group][k + 4] = value(given.a[2]), a[group + 8][k + 4] = value(given.a[3]);
            b[group][k] = value(given.b[0]), b[group][k + 4] = value(given.b[1]);
        }
        accumulate(all, a, b);
    });
}

void copy_16(void* target, const void* source, bool inside) {
    if (!shared().holds(target) || reinterpret_cast<uintptr_t>(target) % 16 != 0)
        fail("the target of a copy is outside shared memory or not aligned to 16 bytes");
    if (reinterpret_cast<uintptr_t>(source) % 16 != 0) fail("the source of a copy is not aligned to 16 bytes");
    std::memset(target, kPoison, 16);
    const auto* from = inside ? static_cast<const unsigned char*>(source) : nullptr;
    self().copies.push_back({static_cast<unsigned char*>(target), from});
}

void commit_copies() { self().committed = self().copies.size(); }

void wait_for_copies() {
    std::vector<Copy>& copies = self().copies;
    for (size_t index = 0; index < self().committed; ++index) {
        if (copies[index].source == nullptr)
            std::memset(copies[index].target, 0, 16);
        else
            std::memcpy(copies[index].target, copies[index].source, 16);
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<ptrdiff_t>(self().committed));
    self().committed = 0;
}

}  // namespace diffseg::cuda
