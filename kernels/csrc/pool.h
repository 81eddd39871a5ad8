/* The process's own worker threads: tasks of one job at a time are claimed in order by an atomic counter. */
#ifndef MOEMESH_POOL_H
#define MOEMESH_POOL_H

#include <stdint.h>

#define MAX_THREADS 256

/* task(argument, index, scratch): scratch is the running thread's own, of the size last reserved. */
typedef void (*PoolTask)(const void *argument, int64_t index, void *scratch);

void pool_enter(void); /* one job at a time in the process: every driver holds the pool from here ... */
void pool_leave(void); /* ... to here; floating-point control is the default in between */
int pool_reserve(int64_t scratch_bytes); /* 0, or -1 when memory is short */
/* A buffer of an operation (level 0), of one that is made of operations (1), of one that is made of those (2), and so
   on: valid until pool_leave or until the level is asked for again; NULL when memory is short. */
#define BUFFER_LEVELS 4
void *pool_buffer(int level, int64_t bytes);
/* Runs task 0 .. num_tasks-1 and returns when all are done; `alone` keeps it on the calling thread. */
void pool_run(PoolTask task, const void *argument, int64_t num_tasks, int alone);
void pool_set_num_threads(int num_threads); /* takes the pool itself; workers start with the next job */
int pool_num_threads(void);
/* The calling thread's operations run on it alone, beside those of the pool, until it takes that back. */
void pool_work_aside(int on);

#endif
