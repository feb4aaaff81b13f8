#include "parallel.h"

#include <stdlib.h>

namespace hf_fp8 {

// GOMP_parallel of libgomp, which LLVM's and Intel's runtimes offer too, or __kmpc_fork_call of the latter two. Both are looked up
// in torch's own libraries: a second runtime would start threads of its own, which compete with torch's for the cores.
typedef void (*GompParallel)(void (*)(void *), void *, unsigned threads, unsigned flags);
typedef void (*KmpcForkCall)(void *where, int32_t count, void (*)(int32_t *, int32_t *, ...), ...);
typedef void (*KmpcPushThreads)(void *where, int32_t thread, int32_t threads);
typedef int32_t (*KmpcThread)(void *where);

static GompParallel gomp_parallel;
static KmpcForkCall kmpc_fork_call;
static KmpcPushThreads kmpc_push_threads;
static KmpcThread kmpc_thread;

struct Region {
    void (*body)(void *);
    void *data;
};
static void run_region(int32_t *, int32_t *, Region *region) { region->body(region->data); }

void parallel(int64_t threads, void (*body)(void *), void *data) {
    if (threads > 1 && gomp_parallel) return gomp_parallel(body, data, (unsigned)threads, 0);
    if (threads > 1 && kmpc_fork_call) {
        // Threads may keep its address until their next region.
        static struct { int32_t reserved_1, flags, reserved_2, reserved_3; const char *where; } where = {0, 2, 0, 0, ";hf_fp8;;0;0;;"};
        Region region = {body, data};
        kmpc_push_threads(&where, kmpc_thread(&where), (int32_t)threads);
        return kmpc_fork_call(&where, 1, (void (*)(int32_t *, int32_t *, ...))run_region, &region);
    }
    body(data);
}

namespace {
struct Kept {
    void *at = nullptr;
    size_t bytes = 0;
    ~Kept() { free(at); }
};
thread_local Kept kept[SLOTS];
const size_t LARGE = 32 << 20;
}  // namespace

void *memory(Slot slot, size_t bytes) {
    Kept &here = kept[slot];
    if (here.bytes < bytes) {
        free(here.at);
        here.bytes = (bytes + 4095) / 4096 * 4096;
        void *found = nullptr;
        if (posix_memalign(&found, 64, here.bytes)) found = nullptr;
        here.at = found;
        if (!here.at) here.bytes = 0;
    }
    return here.at;
}

void release_large(Slot slot) {
    Kept &here = kept[slot];
    if (here.bytes <= LARGE) return;
    free(here.at);
    here.at = nullptr, here.bytes = 0;
}

void release_large() {
    for (int slot = 0; slot < SLOTS; slot++) release_large((Slot)slot);
}

}  // namespace hf_fp8

// Which functions of the OpenMP runtime to use; null for those that it lacks. Without any of them all work is done by the caller.
HF_FP8_EXPORT void hf_fp8_use_openmp(void *gomp, void *fork_call, void *push_threads, void *thread) {
    hf_fp8::gomp_parallel = (hf_fp8::GompParallel)gomp;
    hf_fp8::kmpc_fork_call = push_threads && thread ? (hf_fp8::KmpcForkCall)fork_call : nullptr;
    hf_fp8::kmpc_push_threads = (hf_fp8::KmpcPushThreads)push_threads;
    hf_fp8::kmpc_thread = (hf_fp8::KmpcThread)thread;
}
