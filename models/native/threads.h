/* Threads that stay and help a caller with a piece of work; each library that includes this has its own.
 *
 * A thread that the system wakes too late finds no seat left, and nobody waits for it: so work is cut into units that
 * threads take one by one. Two callers at a time are not both helped, the second one works alone. The threads are as nice
 * as the nicest caller they had, so that what he leaves to others they leave too. A process that was forked starts threads
 * of its own. */

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#if defined(__linux__)
#include <sys/resource.h> /* of a thread, there */
#endif

#define MOST_THREADS 64
#define SPINS 4096          /* some microseconds */
#define SPINS_FOR_WORK 2048 /* the next call often follows at once; while others want the processor they have it */

typedef void (*work_of)(void *argument, int thread);

static struct {
    pthread_mutex_t busy; /* held by the caller whom the threads help */
    pthread_mutex_t door;
    pthread_cond_t opened;
    atomic_uint calls; /* how often the door was opened */
    atomic_int seats, left, nice;
    int started; /* threads, beside the callers */
    work_of work;
    void *argument;
} crew = {.busy = PTHREAD_MUTEX_INITIALIZER, .door = PTHREAD_MUTEX_INITIALIZER, .opened = PTHREAD_COND_INITIALIZER};

static inline void rest(int spins, int most)
{
#if defined(__x86_64__)
    if (spins < most) {
        __builtin_ia32_pause();
        return;
    }
#endif
    (void)spins, (void)most;
    sched_yield(); /* the other one may wait for this core */
}

/* How nice the calling thread is, from 0 on; it becomes so nice first. */
static int niceness(int least)
{
#if defined(__linux__)
    int now = getpriority(PRIO_PROCESS, 0);
    if (now < least && setpriority(PRIO_PROCESS, 0, least) == 0)
        return least;
    return now;
#else
    return least;
#endif
}

static void *stay(void *argument)
{
    unsigned seen = 0;
    int nice = niceness(0);
    (void)argument;
    for (;;) {
        for (int spins = 0; spins < SPINS_FOR_WORK && atomic_load(&crew.calls) == seen; spins++)
            rest(spins % 64, 63);
        pthread_mutex_lock(&crew.door);
        while (atomic_load(&crew.calls) == seen)
            pthread_cond_wait(&crew.opened, &crew.door);
        seen = atomic_load(&crew.calls);
        pthread_mutex_unlock(&crew.door);
        int seats = atomic_load(&crew.seats);
        while (seats > 0 && !atomic_compare_exchange_weak(&crew.seats, &seats, seats - 1))
            ;
        if (seats > 0) {
            if (nice < atomic_load(&crew.nice))
                nice = niceness(atomic_load(&crew.nice));
            crew.work(crew.argument, seats);
            atomic_fetch_add(&crew.left, 1);
        }
    }
    return NULL;
}

static void forget_threads(void)
{
    pthread_mutex_init(&crew.busy, NULL);
    pthread_mutex_init(&crew.door, NULL);
    pthread_cond_init(&crew.opened, NULL);
    crew.started = 0;
    atomic_store(&crew.seats, 0);
}

static __attribute__((constructor)) void watch_forks(void)
{
    pthread_atfork(NULL, NULL, forget_threads);
}

/* Signals are for the threads that the process had before. */
static void start_threads(int count)
{
    sigset_t all, before;
    pthread_attr_t detached;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    pthread_t thread;
    while (crew.started < count && pthread_create(&thread, &detached, stay, NULL) == 0)
        crew.started++;
    pthread_attr_destroy(&detached);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Calls work(argument, thread) in this thread, as 0, and in up to `threads` - 1 others that come in time, as 1, 2, ... */
static void work_together(work_of work, void *argument, int threads)
{
    const int most = (threads < MOST_THREADS ? threads : MOST_THREADS) - 1;
    if (most < 1 || pthread_mutex_trylock(&crew.busy) != 0) {
        work(argument, 0);
        return;
    }
    start_threads(most);
    crew.work = work;
    crew.argument = argument;
    atomic_store(&crew.left, 0);
    atomic_store(&crew.nice, niceness(-20));
    atomic_store(&crew.seats, most);
    pthread_mutex_lock(&crew.door);
    atomic_fetch_add(&crew.calls, 1);
    pthread_mutex_unlock(&crew.door);
    pthread_cond_broadcast(&crew.opened);
    work(argument, 0);
    const int entered = most - atomic_exchange(&crew.seats, 0);
    for (int spins = 0; atomic_load(&crew.left) < entered; spins++)
        rest(spins, SPINS);
    pthread_mutex_unlock(&crew.busy);
}
