// Runs work on the threads of the OpenMP runtime that torch has loaded, and keeps memory for each thread.
#pragma once
#include <stdlib.h>

#include "common.h"

namespace hf_fp8 {

// Calls body(data) once on each of up to `threads` threads, and returns when all have returned.
void parallel(int64_t threads, void (*body)(void *), void *data);

// Calls work(index) for index 0 to count - 1, each once, in any order, on up to `threads` threads.
template <class Work>
void for_each(int64_t count, int64_t threads, const Work &work) {
    struct Shared {
        int64_t next, count;
        const Work *work;
    } shared{0, count, &work};
    parallel(least(threads, count), [](void *data) {
        Shared *s = (Shared *)data;
        for (int64_t i; (i = __atomic_fetch_add(&s->next, 1, __ATOMIC_RELAXED)) < s->count;) (*s->work)(i);
    }, &shared);
}

// Memory of this thread that is reused between calls, from a line of the cache on; null if there is none. Each slot is one use.
enum Slot { INPUTS, NATURAL, PANEL, SUMS, ITEMS, SLOTS };
void *memory(Slot slot, size_t bytes);
// Frees what this thread keeps for large inputs: one use of it, or all.
void release_large(Slot slot);
void release_large();

}  // namespace hf_fp8
