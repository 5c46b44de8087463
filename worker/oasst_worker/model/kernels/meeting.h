/* Where threads or processes wait for each other.
 *
 * OpenMP's own barrier spins for milliseconds, about as long as the system lets another process run. Where cores are
 * shared that is how long every wait may last: the late thread stands behind that process while the waiting one
 * keeps the other core busy. This one spins for as long as a thread is late by itself and then sleeps, which leaves
 * the core to whoever is waited for.
 */
#pragma once
#include <stdatomic.h>
#include <stdint.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#define SPINS 2000
#define SLEEP_NS 100000000 /* At most, before the caller looks about. */

#define LINE 64 /* Bytes that the processor moves from core to core as one. */

/* All zero before the first meeting. On a line of its own, or whoever waits would be woken by others' writes. */
typedef struct {
    _Alignas(LINE) atomic_int arrived;
    atomic_int turn, sleepers;
} meeting;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb"); /* A pause of about the same length; `yield` is none. */
#endif
}

static void sleep_while(atomic_int *value, int seen) {
#ifdef __linux__
    const struct timespec longest = {0, SLEEP_NS};
    syscall(SYS_futex, value, FUTEX_WAIT, seen, &longest, NULL, 0);
#else
    sched_yield();
#endif
}

static void wake_all(atomic_int *value) {
#ifdef __linux__
    syscall(SYS_futex, value, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
#endif
}

/* By each of `count`: returns what `has_turned` is to be asked for. */
static inline int arrive(meeting *m, int count) {
    int turn = atomic_load(&m->turn);
    if (atomic_fetch_add(&m->arrived, 1) + 1 == count) {
        atomic_store(&m->arrived, 0);
        atomic_store(&m->turn, turn + 1);
        if (atomic_load(&m->sleepers)) wake_all(&m->turn);
    }
    return turn;
}

/* Whether all have arrived; waits for them, but not for ever. */
static int has_turned(meeting *m, int turn) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(&m->turn) != turn) return 1;
        relax();
    }
    atomic_fetch_add(&m->sleepers, 1);
    if (atomic_load(&m->turn) == turn) sleep_while(&m->turn, turn);
    atomic_fetch_sub(&m->sleepers, 1);
    return atomic_load(&m->turn) != turn;
}
