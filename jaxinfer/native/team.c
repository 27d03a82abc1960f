#define _GNU_SOURCE
#include "team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
  MOST_THREADS = 64,
  MOST_ITEMS = 0xffff,
  // A helper that finds nothing to do looks so often in a row, then so often with others let through, then it sleeps.
  EAGER_LOOKS = 300,
  POLITE_LOOKS = 100,
};

// Apart by more than a cache line: a processor fetches lines in pairs.
#define APART __attribute__((aligned(128)))

// What is left of a member's share: the number of the piece of work, the next item and the one after the last. All in
// one word, so that nobody can take an item of a piece of work that has ended.
typedef struct {
  APART _Atomic uint64_t word;
} Share;

typedef struct {
  APART _Atomic bool asleep;
  _Atomic int core;
  pthread_t thread;
} Helper;

static Share shares[MOST_THREADS];
static Helper helpers[MOST_THREADS];
static APART _Atomic uint32_t piece;  // goes up with each piece of work; what sleeping helpers wait for
static APART _Atomic int finished;
static Work *work;
static const void *work_data;
static _Atomic int sharers = 1;  // members with a share of the present piece of work
static _Atomic int members = 1;
static int started;  // threads there are, the caller included; 0 before the first call
static cpu_set_t allowed;
static pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static uint64_t share_word(uint32_t number, uint32_t next, uint32_t end) {
  return (uint64_t)number << 32 | next << 16 | end;
}

// Takes an item of a member's share, the first or the last one; -1 if there is none.
static int take(int member, bool first, uint32_t number) {
  uint64_t word = atomic_load(&shares[member].word);
  for (;;) {
    uint32_t next = word >> 16 & 0xffff, end = word & 0xffff;
    if ((uint32_t)(word >> 32) != number || next >= end) return -1;
    uint64_t left = first ? share_word(number, next + 1, end) : share_word(number, next, end - 1);
    if (atomic_compare_exchange_weak(&shares[member].word, &word, left)) return first ? (int)next : (int)end - 1;
  }
}

// Works on a member's own share and then on what others have left. An item that was taken keeps the piece of work from
// ending until it is counted, so what it is made of can be read.
static void take_part(int self, uint32_t number) {
  int item, count = 0;
  for (; (item = take(self, true, number)) >= 0; count++) work(work_data, item);
  int size = sharers;
  for (int k = 1; k <= size; k++) {
    for (; (item = take((self + k) % size, false, number)) >= 0; count++) work(work_data, item);
  }
  if (count) atomic_fetch_add(&finished, count);
}

static uint32_t await_work(Helper *self, uint32_t seen) {
  uint32_t number;
  for (int looks = 0; (number = atomic_load_explicit(&piece, memory_order_acquire)) == seen; looks++) {
    if (looks < EAGER_LOOKS) {
      relax();
    } else if (looks < EAGER_LOOKS + POLITE_LOOKS) {
      sched_yield();
    } else {
      atomic_store(&self->asleep, true);
      if (atomic_load(&piece) == seen) syscall(SYS_futex, &piece, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
      atomic_store(&self->asleep, false);
      looks = 0;
    }
  }
  return number;
}

static void *help(void *argument) {
  int self = (int)(intptr_t)argument;
  for (uint32_t seen = 0;;) {
    seen = await_work(&helpers[self], seen);
    atomic_store_explicit(&helpers[self].core, sched_getcpu(), memory_order_relaxed);
    take_part(self, seen);
  }
  return NULL;
}

// Schedulers leave two threads on one core for seconds where one of them keeps falling asleep.
static void leave_core(Helper *helper, int core) {
  cpu_set_t others = allowed;
  CPU_CLR(core, &others);
  int count = CPU_COUNT(&others), next = -1;  // where it will be, if that is known before it gets to say so
  if (!count) return;
  if (count == 1)
    for (next = 0; !CPU_ISSET(next, &others);) next++;
  atomic_store_explicit(&helper->core, next, memory_order_relaxed);
  pthread_setaffinity_np(helper->thread, sizeof others, &others);
}

// A forked process has none of its parent's threads.
static void after_fork(void) {
  members = started = 1;
  atomic_fetch_add(&piece, 1);  // what its parent was at is none of its business
  pthread_mutex_init(&in_use, NULL);
}

int team_resize(int threads) {
  pthread_mutex_lock(&in_use);
  if (!started) {
    started = 1;
    pthread_atfork(NULL, NULL, after_fork);
    sched_getaffinity(0, sizeof allowed, &allowed);
  }
  threads = threads < MOST_THREADS ? threads : MOST_THREADS;
  // Signals are for the threads of whoever loaded this.
  sigset_t every, before;
  sigfillset(&every);
  pthread_sigmask(SIG_SETMASK, &every, &before);
  for (; started < threads; started++) {
    helpers[started].core = -1;
    if (pthread_create(&helpers[started].thread, NULL, help, (void *)(intptr_t)started)) break;
    pthread_setname_np(helpers[started].thread, "jaxinfer");
    pthread_detach(helpers[started].thread);
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  int size = threads < 1 ? 1 : threads < started ? threads : started;
  members = size;
  pthread_mutex_unlock(&in_use);
  return size;
}

void team_share(Work *todo, const void *data, int items, int threads) {
  if (threads > members) threads = members;
  if (threads < 2 || items < 2 || items > MOST_ITEMS || pthread_mutex_trylock(&in_use)) {
    for (int i = 0; i < items; i++) todo(data, i);
    return;
  }
  work = todo;
  work_data = data;
  uint32_t number = atomic_load(&piece) + 1;
  if (number == 0) number = 1;
  atomic_store(&finished, 0);
  sharers = threads;
  for (int m = 0; m < threads; m++) {
    uint64_t word = share_word(number, (int64_t)items * m / threads, (int64_t)items * (m + 1) / threads);
    atomic_store_explicit(&shares[m].word, word, memory_order_relaxed);
  }
  atomic_store(&piece, number);
  bool sleeping = false;
  int core = sched_getcpu();
  for (int m = 1; m < threads; m++) {
    sleeping |= atomic_load(&helpers[m].asleep);
    if (atomic_load_explicit(&helpers[m].core, memory_order_relaxed) == core) leave_core(&helpers[m], core);
  }
  if (sleeping) syscall(SYS_futex, &piece, FUTEX_WAKE_PRIVATE, threads - 1, NULL, NULL, 0);
  take_part(0, number);
  while (atomic_load_explicit(&finished, memory_order_acquire) < items) relax();
  pthread_mutex_unlock(&in_use);
}

void *team_memory(size_t bytes) {
  static __thread void *held;
  static __thread size_t size;
  if (bytes > size) {
    free(held);
    held = malloc(bytes);
    if (!held) abort();
    size = bytes;
  }
  return held;
}
