// Tries a team of threads: `team_harness NAME` does what the check of that name says, and fails with the line where it
// found otherwise.

#define _GNU_SOURCE
#include "team.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST = 100000 };

#define CHECK(condition)                                                         \
  do {                                                                           \
    if (!(condition)) {                                                          \
      fprintf(stderr, "%s:%d: %s is not so\n", __FILE__, __LINE__, #condition);  \
      _exit(1);                                                                  \
    }                                                                            \
  } while (0)

// What one piece of work leaves behind: how often each item was done, and a number written without any care about
// threads, which is to be there for the caller.
typedef struct {
  atomic_int *times;
  int *plain;
  int salt;
} Record;

static Record record_new(int salt) {
  return (Record){calloc(MOST + 1, sizeof(atomic_int)), calloc(MOST + 1, sizeof(int)), salt};
}

static void record_free(Record record) {
  free(record.times);
  free(record.plain);
}

static void note(const void *data, int item) {
  const Record *record = data;
  atomic_fetch_add_explicit(&record->times[item], 1, memory_order_relaxed);
  record->plain[item] = item ^ record->salt;
}

// Shares some items, and checks that each was done once, by the time that all of them are said to be done.
static void share_once(Record *record, int items, int threads) {
  record->salt++;
  for (int i = 0; i <= items; i++) record->times[i] = 0;
  team_share(note, record, items, threads);
  for (int i = 0; i < items; i++) {
    CHECK(record->times[i] == 1);
    CHECK(record->plain[i] == (i ^ record->salt));
  }
  CHECK(record->times[items] == 0);
}

static void share_all_counts(void) {
  static const int counts[] = {0, 1, 2, 3, 5, 16, 17, 63, 64, 65, 1000, 4096, 65534, 65535, 65536, MOST};
  static const int threads[] = {-1, 0, 1, 2, 3, 4, 5, 64, 1000};
  Record record = record_new(0);
  for (size_t c = 0; c < sizeof counts / sizeof *counts; c++)
    for (size_t t = 0; t < sizeof threads / sizeof *threads; t++) share_once(&record, counts[c], threads[t]);
  record_free(record);
}

// -- checks -----------------------------------------------------------------------------------------------------------

static void before_any_resize(void) { share_all_counts(); }

static void every_size(void) {
  static const int sizes[] = {1, 2, 3, 4, 8};
  for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
    CHECK(team_resize(sizes[s]) == sizes[s]);
    share_all_counts();
  }
}

static void resize(void) {
  CHECK(team_resize(0) == 1);
  CHECK(team_resize(-3) == 1);
  CHECK(team_resize(4) == 4);
  share_all_counts();
  CHECK(team_resize(1) == 1);
  share_all_counts();
  CHECK(team_resize(3) == 3);
  share_all_counts();
  CHECK(team_resize(4) == 4);
  int most = team_resize(1000);
  CHECK(most >= 4 && most < 1000);
  Record record = record_new(7);
  for (int i = 0; i < 50; i++) share_once(&record, 200, most);
  record_free(record);
}

// One small piece after the other: helpers are late for most of them.
static void one_after_another(void) {
  team_resize(4);
  Record record = record_new(1);
  for (int i = 0; i < 20000; i++) share_once(&record, 1 + i % 19, 1 + i % 5);
  record_free(record);
}

// Helpers fall asleep in between.
static void after_a_pause(void) {
  team_resize(3);
  Record record = record_new(2);
  for (int i = 0; i < 60; i++) {
    usleep(i % 3 ? 3000 : 200);
    share_once(&record, 40, 3);
  }
  record_free(record);
}

static void slow_first(const void *data, int item) {
  if (item == 0 || item == 37) usleep(300);
  note(data, item);
}

static void items_of_different_length(void) {
  team_resize(4);
  Record record = record_new(3);
  for (int i = 0; i < 100; i++) {
    for (int k = 0; k < 50; k++) record.times[k] = 0;
    team_share(slow_first, &record, 50, 4);
    for (int k = 0; k < 50; k++) CHECK(record.times[k] == 1);
  }
  record_free(record);
}

static void share_within(const void *data, int item) {
  Record inner = record_new(item);
  share_once(&inner, 30, 4);
  record_free(inner);
  note(data, item);
}

static void within_an_item(void) {
  team_resize(4);
  Record record = record_new(4);
  team_share(share_within, &record, 64, 4);
  for (int k = 0; k < 64; k++) CHECK(record.times[k] == 1);
  record_free(record);
}

static void *share_many(void *argument) {
  Record record = record_new((int)(long)argument);
  for (int i = 0; i < 3000; i++) share_once(&record, 1 + (i * 7) % 90, 4);
  record_free(record);
  return NULL;
}

static void callers_at_once(void) {
  team_resize(4);
  pthread_t callers[4];
  for (long k = 0; k < 4; k++) CHECK(!pthread_create(&callers[k], NULL, share_many, (void *)(k << 20)));
  for (int i = 0; i < 20; i++) team_resize(1 + i % 4);
  for (int k = 0; k < 4; k++) CHECK(!pthread_join(callers[k], NULL));
}

static int exit_code_of(pid_t child) {
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void after_fork(void) {
  team_resize(3);
  share_all_counts();
  for (int generation = 0; generation < 3; generation++) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      share_all_counts();  // by itself
      CHECK(team_resize(4) == 4);
      share_all_counts();
      pid_t grandchild = fork();
      CHECK(grandchild >= 0);
      if (grandchild == 0) {
        CHECK(team_resize(2) == 2);
        share_all_counts();
        _exit(0);
      }
      CHECK(exit_code_of(grandchild) == 0);
      share_all_counts();
      _exit(0);
    }
    CHECK(exit_code_of(child) == 0);
    share_all_counts();
  }
}

static atomic_int begun, released;

static void linger(const void *data, int item) {
  (void)data, (void)item;
  begun++;
  while (!released) usleep(100);
}

static void *share_lingering(void *argument) {
  (void)argument;
  team_share(linger, NULL, 40, 2);
  return NULL;
}

// Another thread's piece of work is under way: the child has the records of it, but none of its threads.
static void fork_amid_work(void) {
  team_resize(2);
  pthread_t caller;
  CHECK(!pthread_create(&caller, NULL, share_lingering, NULL));
  while (!begun) usleep(100);
  pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    released = 1;
    int before = begun;
    Record record = record_new(5);
    share_once(&record, 300, 4);
    CHECK(team_resize(4) == 4);
    usleep(50000);
    for (int i = 0; i < 200; i++) share_once(&record, 300, 4);
    CHECK(begun == before);
    _exit(0);
  }
  int code = exit_code_of(child);
  released = 1;
  CHECK(!pthread_join(caller, NULL));
  CHECK(begun == 40);
  CHECK(code == 0);
  share_all_counts();
}

int main(int count, char **names) {
#define CHECK_NAMED(name) {#name, name}
  static const struct {
    const char *name;
    void (*run)(void);
  } checks[] = {
      CHECK_NAMED(before_any_resize), CHECK_NAMED(every_size),      CHECK_NAMED(resize),
      CHECK_NAMED(one_after_another), CHECK_NAMED(after_a_pause),   CHECK_NAMED(items_of_different_length),
      CHECK_NAMED(within_an_item),    CHECK_NAMED(callers_at_once), CHECK_NAMED(after_fork),
      CHECK_NAMED(fork_amid_work),
  };
  for (size_t k = 0; k < sizeof checks / sizeof *checks; k++) {
    if (count == 2 && !strcmp(names[1], checks[k].name)) {
      checks[k].run();
      return 0;
    }
  }
  fprintf(stderr, "there is no such check\n");
  return 2;
}
