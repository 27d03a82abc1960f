// A team of threads that share the items of one piece of work.
//
// XLA's own pool wakes a thread for each task, which takes longer than many of the pieces here. This team's helpers stay
// awake for some microseconds after a piece of work, so that the next one of a program meets them running.

#ifndef JAXINFER_TEAM_H
#define JAXINFER_TEAM_H

#include <stddef.h>

typedef void Work(const void *data, int item);

// Runs work(data, 0), …, work(data, items - 1) on about `threads` threads, and returns when all have ended.
//
// The caller starts with the first items, helper k with its own share, in each call the same one: what a share reads
// stays in the cache of one core from call to call. Whoever is done takes items from the end of another's share, so a
// helper that is late or held up costs what it had begun and no more.
void team_share(Work *work, const void *data, int items, int threads);

// Memory of the calling thread, kept for its next item; what was in it is lost.
void *team_memory(size_t bytes);

// How many threads share work from now on, the caller included; returns how many there are.
int team_resize(int threads);

#endif
