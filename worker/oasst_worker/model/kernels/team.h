/* The threads of a parallel region, who wait for each other between two parts of it.
 *
 * OpenMP's own barrier spins for milliseconds, about as long as the system lets another process run. Where cores are
 * shared that is how long every wait may last: the late thread stands behind that process while the waiting one keeps
 * the other core busy. This one spins for as long as a thread is late by itself and then sleeps, which leaves the core
 * to whoever is waited for.
 */
#pragma once
#include <stdatomic.h>
#include <stdint.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#else
static inline int omp_get_thread_num(void) { return 0; }
static inline int omp_get_num_threads(void) { return 1; }
#endif

#define SPINS 2000

/* All zero before the region. */
typedef struct {
    atomic_int arrived, turn, sleepers;
} team;

static inline void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb"); /* A pause of about the same length; `yield` is none. */
#endif
}

static void sleep_while(atomic_int *value, int seen) {
#ifdef __linux__
    syscall(SYS_futex, value, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
#else
    sched_yield();
#endif
}

static void wake_all(atomic_int *value) {
#ifdef __linux__
    syscall(SYS_futex, value, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
#endif
}

/* By each thread of the team: returns when all have called it. */
static void meet(team *t) {
    int turn = atomic_load(&t->turn);
    if (atomic_fetch_add(&t->arrived, 1) + 1 == omp_get_num_threads()) {
        atomic_store(&t->arrived, 0);
        atomic_store(&t->turn, turn + 1);
        if (atomic_load(&t->sleepers)) wake_all(&t->turn);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load(&t->turn) != turn) return;
        relax();
    }
    atomic_fetch_add(&t->sleepers, 1);
    while (atomic_load(&t->turn) == turn) sleep_while(&t->turn, turn);
    atomic_fetch_sub(&t->sleepers, 1);
}
