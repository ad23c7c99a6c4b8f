/* How threads work on one share together.
 *
 * Of enough rows each thread takes a part: all of a layer happens in its own cache but for the keys and values that the parts
 * have of each other. What that costs is that each reads all weights. Of few rows, or for many threads, a layer is cut
 * into stages instead, whose units are panels, heads or rows: what one thread writes others read next.
 *
 * Either way work is taken as it becomes ready, so a thread that the system has not woken yet keeps nobody waiting. */

#define STAGES 9       /* of a layer */
#define FEWEST_ROWS 12 /* of a part: below, its weights take longer to come than to be multiplied (on two cores) */
#define MOST_PARTS 4   /* more would wait for weights, each for all of them, where a caller may find nobody to help */

typedef struct {
    _Alignas(64) atomic_int taken, done; /* units */
} stage;

/* Some of a share's rows. A layer is two steps for them: query, key and value; and the rest. */
typedef struct {
    _Alignas(64) atomic_int taken, done; /* steps of all layers */
    atomic_int attended;                 /* layers whose keys and values it needs no more */
} part;

/* The next unit of a stage for this thread; -1 once all units are done, by whomever. */
static int64_t next_unit(stage *own, int units, int64_t finished)
{
    if (finished >= 0)
        atomic_fetch_add_explicit(&own->done, 1, memory_order_release);
    const int unit = atomic_load_explicit(&own->taken, memory_order_relaxed) < units
                         ? atomic_fetch_add_explicit(&own->taken, 1, memory_order_relaxed)
                         : units;
    if (unit < units)
        return unit;
    for (int spins = 0; atomic_load_explicit(&own->done, memory_order_acquire) < units; spins++)
        rest(spins, SPINS);
    return -1;
}

static stage *after(stage *own)
{
    return own ? own + 1 : NULL;
}

/* For each range of `count` things in units of `each`, from `from` to `to`: one range of all where a thread is alone. */
#define EACH_RANGE(own, count, each)                                                                                  \
    for (int64_t of_one = (own) ? (each) : (count), units = ((count) + of_one - 1) / of_one,                          \
                 unit = (own) ? next_unit(own, (int)units, -1) : 0, from, to;                                         \
         unit >= 0 && (from = unit * of_one, to = from + of_one < (count) ? from + of_one : (count), true);           \
         unit = (own) ? next_unit(own, (int)units, unit) : -1)

/* Whether all parts are ready for one of them to take a step: for attention all have keys and values; for those of the
 * next layer none needs these any more. */
static bool ready(const part *parts, int count, int step)
{
    for (int i = 0; i < count; i++)
        if (step % 2 == 1 ? atomic_load_explicit(&parts[i].done, memory_order_acquire) < step
                          : atomic_load_explicit(&parts[i].attended, memory_order_acquire) < step / 2)
            return false;
    return true;
}

/* The part that this thread takes the next step of, and which: of its last part, if nobody else does; -1 once all is done. */
static int next_part(part *parts, int count, int last, int steps, int *step)
{
    for (int spins = 0, open = 1; open > 0; spins++) {
        open = count;
        for (int i = 0; i < count; i++) {
            const int number = (last + i) % count;
            part *own = &parts[number];
            int taken = *step = atomic_load_explicit(&own->done, memory_order_acquire);
            if (*step == steps)
                open--;
            else if (atomic_load_explicit(&own->taken, memory_order_relaxed) == *step && ready(parts, count, *step) &&
                     atomic_compare_exchange_strong(&own->taken, &taken, *step + 1))
                return number;
        }
        rest(spins, SPINS);
    }
    return -1;
}
