/* What the processes of one machine give each other, through memory they share.
 *
 * Every process has a slot in each of two sets. To exchange, all put a piece into their slots of one set and meet;
 * then each reads what it wants. The next piece goes into the other set: whoever comes to a third has met the others
 * at the second, which they came to when they had read the first. */
#include "scalars.h"
#include "team.h"
#include <errno.h>
#include <signal.h>
#include <unistd.h>

#define SLOT (256 * 1024) /* Bytes. */
#define MOST_PROCESSES 64

/* At the beginning of the memory, zero at first; the slots come behind it, each on lines of its own. */
typedef struct {
    meeting place;
    _Atomic int64_t processes[MOST_PROCESSES]; /* Their ids, for whoever waits for one that has ended. */
} header;

typedef struct {
    int64_t index, count; /* This process among so many. */
    int64_t turn;         /* How many pieces it has exchanged. */
    int64_t is_broken;    /* Another has ended: nothing is exchanged any more. */
    header *memory;
} party;

/* Returns 0 where that many cannot take part. */
int64_t size_of_memory(int64_t count) {
    return count <= MOST_PROCESSES ? (int64_t)sizeof(header) + 2 * count * SLOT : 0;
}

void join(party *p) { atomic_store(&p->memory->processes[p->index], getpid()); }

static char *slot_of(const party *p, int64_t index, int64_t turn) {
    return (char *)(p->memory + 1) + (turn % 2 * p->count + index) * SLOT;
}

static int are_all_there(const party *p) {
    for (int64_t i = 0; i < p->count; i++) {
        int64_t id = atomic_load(&p->memory->processes[i]);
        if (id && kill(id, 0) && errno == ESRCH) return 0;
    }
    return 1;
}

/* Returns 0 if one of the processes has ended instead of coming. */
static int meet_all(party *p) {
    int turn = arrive(&p->memory->place, p->count);
    while (!p->is_broken && !has_turned(&p->memory->place, turn))
        p->is_broken = !are_all_there(p) && !has_turned(&p->memory->place, turn);
    return !p->is_broken;
}

/* By a whole team of threads, each for its own slice: the part becomes the sum of all parts, added in the order of
 * the processes. Where one of them has ended the party is broken, and nothing is done. */
void sum_by_team(team *all, party *p, scalar *part, int64_t count) {
    if (p->is_broken) return;
    const int64_t most = SLOT / sizeof(scalar), thread = omp_get_thread_num(), threads = omp_get_num_threads();
    int64_t turn = p->turn;
    for (int64_t start = 0; start < count; start += most, turn++) {
        int64_t size = min(count - start, most), each = (size + threads - 1) / threads;
        each = (each + LANES - 1) / LANES * LANES;
        int64_t from = min(thread * each, size), end = min(from + each, size);
        memcpy((scalar *)slot_of(p, p->index, turn) + from, part + start + from, (end - from) * sizeof(scalar));
        meet(all);
        if (thread == 0) p->turn++, meet_all(p);
        meet(all);
        if (p->is_broken) return;
        const scalar *slots[MOST_PROCESSES];
        for (int64_t i = 0; i < p->count; i++) slots[i] = (const scalar *)slot_of(p, i, turn);
        for (int64_t i = from; i < end; i += LANES) {
            vector total = load_some(slots[0] + i, end - i);
            for (int64_t other = 1; other < p->count; other++)
                total = rounded(total + load_some(slots[other] + i, end - i));
            store_some(part + start + i, total, end - i);
        }
    }
    meet(all);
}

/* As `sum_by_team`, by a team of its own. */
void sum(party *p, int64_t num_threads, scalar *part, int64_t count) {
    team all = {0};
#pragma omp parallel num_threads(num_threads)
    sum_by_team(&all, p, part, count);
}

/* Parts [rows, width] of all processes side by side: at the first one, out [rows, columns]. Where one of them has
 * ended the party is broken. */
void gather_columns(
    party *p, const scalar *part, int64_t rows, int64_t width, int64_t columns, scalar *out) {
    if (p->is_broken) return;
    const int64_t most = SLOT / sizeof(scalar);
    for (int64_t from = 0; from < width; from += most) {
        int64_t wide = min(width - from, most), rows_at_once = most / wide;
        for (int64_t start = 0; start < rows; start += rows_at_once, p->turn++) {
            int64_t size = min(rows - start, rows_at_once);
            scalar *own = (scalar *)slot_of(p, p->index, p->turn);
            for (int64_t i = 0; i < size; i++)
                memcpy(own + i * wide, part + (start + i) * width + from, wide * sizeof(scalar));
            if (!meet_all(p)) return;
            for (int64_t other = 0; out && other < p->count; other++) {
                int64_t column = other * width + from, end = min(columns, column + wide);
                for (int64_t i = 0; i < size && column < end; i++)
                    memcpy(
                        out + (start + i) * columns + column, (scalar *)slot_of(p, other, p->turn) + i * wide,
                        (end - column) * sizeof(scalar));
            }
        }
    }
}
