/* Threads that stay and do a piece of work with or for a caller; each library that includes this has its own.
 *
 * Work is cut into units that threads take one by one: a thread that the system wakes too late finds no seat left, and
 * nobody waits for it. There are three crews. That beside its caller helps one that works too; of two callers at a time the
 * second works alone. (Its threads are as nice as the caller for whom they were started, who should be no nicer than the
 * process.) That behind works for callers that wait, one after the other, and is nicer: it leaves the processors to
 * all others, while a caller keeps its own niceness for what it does before and after. (Were it as nice itself, it
 * could be kept from a processor while it holds what others wait for, Python's lock above all.) The last one does the same
 * when nobody else wants a processor, and else next to nothing; no thread comes back from there, so it is a crew of its own.
 * A process that was forked starts threads of its own. */

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/resource.h> /* of a thread, there */
#include <sys/syscall.h>
#define HAS_NICE_THREADS true
#else
#define HAS_NICE_THREADS false
#endif

#define MOST_THREADS 64
#define SPINS 4096          /* some microseconds */
#define SPINS_FOR_WORK 2048 /* the next call often follows at once; while others want the processor they have it */
#define MOST_NICE 19            /* more steps than that: behind all others */
#define LONG_SLICE_NS 100000000 /* the longest there is */

typedef void (*work_of)(void *argument, int thread);

typedef struct {
    pthread_mutex_t busy; /* held by the caller for whom the threads work */
    pthread_mutex_t door;
    pthread_cond_t opened, ended;
    atomic_uint calls; /* how often the door was opened */
    atomic_int seats;  /* that are free */
    atomic_int owed;   /* seats that are not settled: whoever took them is not done, or somebody may take them yet */
    int offered;       /* seats of this call */
    int first;         /* number of a seat; the first one that is taken has it, as some work is for number 0 alone */
    bool waited_for;   /* by a caller that sleeps */
    int nicer;         /* than the process, in this call */
    int started;       /* threads */
    pthread_t threads[MOST_THREADS];
    int off_core, kept_off; /* the core that so many of them are kept off, see `keep_off_this_core` */
    work_of work;
    void *argument;
} crew;

#define NEW_CREW \
    .busy = PTHREAD_MUTEX_INITIALIZER, .door = PTHREAD_MUTEX_INITIALIZER, .opened = PTHREAD_COND_INITIALIZER, \
    .ended = PTHREAD_COND_INITIALIZER

static crew crew_beside = {NEW_CREW, .first = 1}, crew_behind = {NEW_CREW, .first = 0, .waited_for = true},
            crew_last = {NEW_CREW, .first = 0, .waited_for = true};

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

/* Nicer than the process; and with a slice that is longer than that of others, who need not wait for its end then: so do
 * newer kernels (6.12), older ones know of no slices. Of more steps than there are, it runs where nobody else would; the slice
 * counts all the same, for those of other sessions and control groups, who are not told of that. */
static void give_way(int steps)
{
#if defined(__linux__)
    const int nicer = getpriority(PRIO_PROCESS, (id_t)getpid()) + steps;
    setpriority(PRIO_PROCESS, 0, nicer < MOST_NICE ? nicer : MOST_NICE);
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t slice_ns, deadline, period;
    } own = {.size = sizeof own};
    if (syscall(SYS_sched_getattr, 0, &own, sizeof own, 0) != 0 || own.policy != SCHED_OTHER)
        return;
    own.slice_ns = LONG_SLICE_NS;
    syscall(SYS_sched_setattr, 0, &own, 0);
    if (steps > MOST_NICE)
        sched_setscheduler(0, SCHED_IDLE, &(struct sched_param){0});
#else
    (void)steps;
#endif
}

/* No seat is taken any more: there are no units left for it. So many of those that were are settled; whether now all are. */
static bool close_seats(crew *own, int settled)
{
    settled += atomic_exchange(&own->seats, 0);
    return atomic_fetch_sub(&own->owed, settled) == settled;
}

static void *stay(void *argument)
{
    crew *own = argument;
    unsigned seen = 0;
    int nicer = 0;
    for (;;) {
        if (!own->waited_for)
            for (int spins = 0; spins < SPINS_FOR_WORK && atomic_load(&own->calls) == seen; spins++)
                rest(spins % 64, 63);
        pthread_mutex_lock(&own->door);
        while (atomic_load(&own->calls) == seen)
            pthread_cond_wait(&own->opened, &own->door);
        seen = atomic_load(&own->calls);
        pthread_mutex_unlock(&own->door);
        int seats = atomic_load(&own->seats);
        while (seats > 0 && !atomic_compare_exchange_weak(&own->seats, &seats, seats - 1))
            ;
        if (seats <= 0)
            continue;
        if (nicer < own->nicer)
            give_way(nicer = own->nicer);
        own->work(own->argument, own->first + own->offered - seats);
        if (close_seats(own, 1) && own->waited_for) {
            pthread_mutex_lock(&own->door);
            pthread_cond_signal(&own->ended);
            pthread_mutex_unlock(&own->door);
        }
    }
    return NULL;
}

static void forget_threads_of(crew *own)
{
    pthread_mutex_init(&own->busy, NULL);
    pthread_mutex_init(&own->door, NULL);
    pthread_cond_init(&own->opened, NULL);
    pthread_cond_init(&own->ended, NULL);
    own->started = own->kept_off = 0;
    atomic_store(&own->seats, 0);
    atomic_store(&own->owed, 0);
}

static void forget_threads(void)
{
    forget_threads_of(&crew_beside);
    forget_threads_of(&crew_behind);
    forget_threads_of(&crew_last);
}

static __attribute__((constructor)) void watch_forks(void)
{
    pthread_atfork(NULL, NULL, forget_threads);
}

/* Signals are for the threads that the process had before. */
static void start_threads(crew *own, int count)
{
    sigset_t all, before;
    pthread_attr_t detached;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    while (own->started < count && pthread_create(&own->threads[own->started], &detached, stay, own) == 0)
        own->started++;
    pthread_attr_destroy(&detached);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Helpers have any core but the caller's own: the system may wake one there, to wait for milliseconds while another core
 * has nothing to do. */
static void keep_off_this_core(crew *own)
{
#if defined(__linux__)
    const int core = sched_getcpu();
    cpu_set_t others;
    if (core < 0 || (core == own->off_core && own->kept_off == own->started))
        return;
    if (sched_getaffinity(0, sizeof others, &others) != 0)
        return;
    CPU_CLR(core, &others);
    for (int i = 0; CPU_COUNT(&others) > 0 && i < own->started; i++)
        pthread_setaffinity_np(own->threads[i], sizeof others, &others);
    own->off_core = core;
    own->kept_off = own->started;
#else
    (void)own;
#endif
}

/* Calls the crew, of which so many may take a seat. */
static void open_door(crew *own, work_of work, void *argument, int seats, int nicer)
{
    own->work = work;
    own->argument = argument;
    own->offered = seats;
    own->nicer = nicer;
    atomic_store(&own->owed, seats);
    atomic_store(&own->seats, seats);
    pthread_mutex_lock(&own->door);
    atomic_fetch_add(&own->calls, 1);
    pthread_mutex_unlock(&own->door);
    pthread_cond_broadcast(&own->opened);
}

static void work_beside(work_of work, void *argument, int helpers)
{
    crew *own = &crew_beside;
    if (helpers < 1 || pthread_mutex_trylock(&own->busy) != 0) {
        work(argument, 0);
        return;
    }
    start_threads(own, helpers);
    keep_off_this_core(own);
    open_door(own, work, argument, helpers, 0);
    work(argument, 0);
    bool ended = close_seats(own, 0);
    for (int spins = 0; !ended && atomic_load(&own->owed) > 0; spins++)
        rest(spins, SPINS);
    pthread_mutex_unlock(&own->busy);
}

static void work_behind(work_of work, void *argument, int threads, int nicer)
{
    crew *own = nicer > MOST_NICE ? &crew_last : &crew_behind;
    pthread_mutex_lock(&own->busy);
    start_threads(own, threads);
    if (own->started == 0)
        work(argument, 0);
    else {
        open_door(own, work, argument, threads, nicer);
        pthread_mutex_lock(&own->door);
        while (atomic_load(&own->owed) > 0)
            pthread_cond_wait(&own->ended, &own->door);
        pthread_mutex_unlock(&own->door);
    }
    pthread_mutex_unlock(&own->busy);
}

/* Calls work(argument, thread) in up to `threads` threads, as 0, 1, ...: this one and others that come in time or, where it
 * is to be done that much nicer, others alone. */
static void work_together(work_of work, void *argument, int threads, int nicer)
{
    threads = threads < MOST_THREADS ? threads : MOST_THREADS;
    if (nicer > 0 && HAS_NICE_THREADS)
        work_behind(work, argument, threads > 1 ? threads : 1, nicer);
    else
        work_beside(work, argument, threads - 1);
}
