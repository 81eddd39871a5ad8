/* Worker threads. After a job they spin for a moment, because the next kernel mostly follows within microseconds; then
   they look on while giving the core to whoever wants it, long enough for what a step does between its kernels; then
   they sleep. A worker joins a job only while it is open: one that wakes late finds it closed and is not waited for,
   so that a worker without a core delays nobody. Threads start with the first job that needs them; a forked child
   starts with none. */
#define _GNU_SOURCE
#include "pool.h"

#include "ops.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SPIN_NANOSECONDS 200000
#define LOOK_ON_NANOSECONDS 1000000
#define HUGE_PAGE (2 << 20)
#define CLAIMS 32 /* per thread and job: more would only cost, fewer would leave threads waiting for the last one */
#define CLOSED ((uint64_t)1 << 31) /* state: job number << 32 | CLOSED | workers inside */

static struct {
    pthread_mutex_t owner; /* held from pool_enter to pool_leave */
    pthread_mutex_t lock;  /* for sleeping only */
    pthread_cond_t wake;
    pthread_t threads[MAX_THREADS];
    void *scratch[MAX_THREADS];
    int64_t scratch_bytes[MAX_THREADS], buffer_bytes[BUFFER_LEVELS];
    void *buffers[BUFFER_LEVELS];
    int num_threads, num_started;
    uint64_t saved_control;
    PoolTask task;
    const void *argument;
    int64_t num_tasks, grain; /* grain: tasks claimed at a time */
    _Atomic int64_t next;
    _Atomic uint64_t state;
    _Atomic int sleepers, stop;
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER,
          .num_threads = 1, .state = CLOSED};

/* Of a thread that works aside: what it runs is done on it alone, in memory of its own, and delays nobody. */
static _Thread_local struct {
    int on;
    void *scratch, *buffers[BUFFER_LEVELS];
    int64_t scratch_bytes, buffer_bytes[BUFFER_LEVELS];
    uint64_t saved_control;
} aside;

static void restore_floating_point(uint64_t control)
{
#if defined(__x86_64__)
    _mm_setcsr((uint32_t)control);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(control));
#endif
}

/* Round to nearest, keep subnormals: another library may have changed it. Returns what it was. */
static uint64_t default_floating_point(void)
{
    uint64_t before = 0;
#if defined(__x86_64__)
    before = _mm_getcsr();
    restore_floating_point(0x1F80);
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    restore_floating_point(0);
#endif
    return before;
}

static void relax(void)
{
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_nanoseconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void work(void *scratch)
{
    for (int64_t start; (start = atomic_fetch_add(&pool.next, pool.grain)) < pool.num_tasks;)
        for (int64_t i = start; i < start + pool.grain && i < pool.num_tasks; i++)
            pool.task(pool.argument, i, scratch);
}

/* Waits until the job number is not `seen` any more, or for the stop sign. */
static void await_job(uint32_t seen)
{
    const int64_t start = now_nanoseconds();
    for (int64_t waited = 0; waited < LOOK_ON_NANOSECONDS; waited = now_nanoseconds() - start) {
        for (int i = 0; i < 32; i++) {
            if (atomic_load(&pool.state) >> 32 != seen || atomic_load(&pool.stop))
                return;
            relax();
        }
        if (waited > SPIN_NANOSECONDS)
            sched_yield();
    }
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.sleepers, 1);
    while (atomic_load(&pool.state) >> 32 == seen && !atomic_load(&pool.stop))
        pthread_cond_wait(&pool.wake, &pool.lock);
    atomic_fetch_sub(&pool.sleepers, 1);
    pthread_mutex_unlock(&pool.lock);
}

static void *worker(void *index)
{
    uint32_t seen = 0;
    default_floating_point();
    while (!atomic_load(&pool.stop)) {
        uint64_t state = atomic_load(&pool.state);
        if (state >> 32 == seen || state & CLOSED) {
            seen = state >> 32;
            await_job(seen);
        } else if (atomic_compare_exchange_weak(&pool.state, &state, state + 1)) {
            seen = state >> 32;
            work(pool.scratch[(intptr_t)index]);
            atomic_fetch_sub(&pool.state, 1);
        }
    }
    return NULL;
}

static void wake_workers(void)
{
    if (atomic_load(&pool.sleepers) == 0)
        return;
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

static void stop_workers(void)
{
    atomic_store(&pool.stop, 1);
    wake_workers();
    for (int i = 1; i < pool.num_started; i++)
        pthread_join(pool.threads[i], NULL);
    atomic_store(&pool.stop, 0);
    pool.num_started = 0;
}

static void start_workers(void)
{
    if (pool.num_started == 0)
        pool.num_started = 1;
    while (pool.num_started < pool.num_threads) {
        intptr_t index = pool.num_started;
        if (pthread_create(&pool.threads[index], NULL, worker, (void *)index) != 0)
            return; /* fewer threads, same results */
        pool.num_started++;
    }
}

void pool_run(PoolTask task, const void *argument, int64_t num_tasks, int alone)
{
    if (alone || aside.on || pool.num_threads == 1 || num_tasks == 1) {
        for (int64_t i = 0; i < num_tasks; i++)
            task(argument, i, aside.on ? aside.scratch : pool.scratch[0]);
        return;
    }
    start_workers();
    pool.task = task;
    pool.argument = argument;
    pool.num_tasks = num_tasks;
    pool.grain = num_tasks < CLAIMS * pool.num_threads ? 1 : num_tasks / (CLAIMS * pool.num_threads);
    atomic_store(&pool.next, 0);
    atomic_store(&pool.state, ((atomic_load(&pool.state) >> 32) + 1) << 32);
    wake_workers();
    work(pool.scratch[0]);
    uint64_t state = atomic_fetch_or(&pool.state, CLOSED);
    for (int spins = 0; (uint32_t)state & ~(uint32_t)CLOSED; state = atomic_load(&pool.state)) {
        if (++spins < 2000)
            relax();
        else
            sched_yield(); /* the worker may be waiting for this very core */
    }
}

static int grow(void **place, int64_t *have, int64_t want)
{
    if (want <= *have)
        return 0;
    free(*place);
    want += want / 4;
    const int64_t alignment = want < 2 * HUGE_PAGE ? 64 : HUGE_PAGE;
    want = (want + alignment - 1) / alignment * alignment;
    *place = aligned_alloc(alignment, want);
    *have = *place ? want : 0;
    if (*place && alignment == HUGE_PAGE)
        op_advise_huge_pages(*place, want);
    return *place ? 0 : -1;
}

int pool_reserve(int64_t scratch_bytes)
{
    if (aside.on)
        return grow(&aside.scratch, &aside.scratch_bytes, scratch_bytes);
    for (int i = 0; i < pool.num_threads; i++)
        if (grow(&pool.scratch[i], &pool.scratch_bytes[i], scratch_bytes) != 0)
            return -1;
    return 0;
}

void *pool_buffer(int level, int64_t bytes)
{
    void **place = aside.on ? &aside.buffers[level] : &pool.buffers[level];
    return grow(place, aside.on ? &aside.buffer_bytes[level] : &pool.buffer_bytes[level], bytes) == 0 ? *place : NULL;
}

void pool_enter(void)
{
    if (aside.on) {
        aside.saved_control = default_floating_point();
        return;
    }
    pthread_mutex_lock(&pool.owner);
    pool.saved_control = default_floating_point();
}

void pool_leave(void)
{
    if (aside.on) {
        restore_floating_point(aside.saved_control);
        return;
    }
    restore_floating_point(pool.saved_control);
    pthread_mutex_unlock(&pool.owner);
}

void pool_work_aside(int on)
{
    if (!on) {
        free(aside.scratch);
        for (int level = 0; level < BUFFER_LEVELS; level++)
            free(aside.buffers[level]);
        memset(&aside, 0, sizeof aside);
    }
    aside.on = on;
}

void pool_set_num_threads(int num_threads)
{
    pool_enter();
    if (num_threads != pool.num_threads) {
        stop_workers();
        pool.num_threads = num_threads;
    }
    pool_leave();
}

int pool_num_threads(void) { return pool.num_threads; }

static void before_fork(void) { pthread_mutex_lock(&pool.owner); }
static void after_fork_parent(void) { pthread_mutex_unlock(&pool.owner); }
static void after_fork_child(void)
{
    pool.num_started = 0;
    atomic_store(&pool.sleepers, 0);
    atomic_store(&pool.state, (atomic_load(&pool.state) >> 32) << 32 | CLOSED);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pthread_mutex_init(&pool.owner, NULL);
}

__attribute__((constructor)) static void guard_forks(void)
{
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}
