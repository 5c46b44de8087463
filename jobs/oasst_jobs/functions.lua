-- The job queue: every change to it is one of these functions, whole or not at all.
--
-- The loader (library.py) puts two lines on top: the shebang that names the library, and `local VERSION`, a hash of
-- this text. Libraries of several versions live beside each other while a fleet is being replaced.
--
-- KEYS[1] is always the shard's root, such as `oasst:{0}`. All other keys begin with it, so they lie in its slot.
-- keys.py says what each key and each field of a job holds.
--
-- Rules every function keeps:
--   * time is Redis's own; callers only name durations;
--   * the job hash is the truth; an index that disagrees with it is corrected where it is met, and by `reconcile`;
--   * finished, cancelled, expired and failed are final, unless a person revives a dead job;
--   * applied twice, a function leaves what it left the first time and gives an answer that is still true.

local LAST_LANE = 2                -- lanes are 0 for the most urgent priority, then 1, 2
local HEAD_START = 4096            -- virtual tokens by which a lane comes before the next one
local ARRIVAL = 2 ^ -10            -- virtual tokens that one arrival takes, so that equals keep their order
local FLOWS_TTL_MS = 3600000
local CLAIM_WINDOW = 256           -- waiting jobs that one claim looks at
local PASSED_OVER = 16             -- jobs without room that one claim passes over
local PATIENCE_MS = 2000           -- how long a job may be passed over before a worker keeps itself for it
local KEPT_MS = 10000              -- how long a worker keeps itself for a job without asking for it again
local MAX_LEASE_MS = 120000        -- a lease that ends later than this from now comes from a clock that jumped
local WAKE_TTL_MS = 10000
local UPDATES_KEPT = 10000         -- batches in a gateway's stream; who falls behind further reads the logs
local UPDATES_TTL_MS = 60000
local WORKER_TTL_MS = 15000
local WATCH_TTL_MS = 60000         -- for so long a gateway that says nothing counts as watching
local VERSION_TTL_MS = 3600000     -- a library that nobody has used for so long may go

-- What the loss of a worker charges to its jobs. A suspect was claimed by it and had no token from it yet.
local SUSPECT_CHARGE = 4
local BYSTANDER_CHARGE = 1         -- to all, where there was no suspect
local SOLO_CHARGE = 8              -- from here on a job runs alone on its worker
local DEAD_CHARGE = 12             -- here it is taken out
local SOLO_LOST_LEASES = 8         -- a job that lost so many workers in all runs alone, whatever it is charged
local SUSPECTS_TTL_MS = 120000
local DEAD_TTL_MS = 86400000       -- how long a dead job can be looked at and revived
local POISON_TTL_MS = 3600000      -- how long its tenant's same prompt is refused

local MAX_UNPACKED = 1000          -- arguments of one command that come out of a table: Lua's stack holds no 8,000

local RESERVE = 2                  -- a full queue takes up to so many times its limit, of tenants below their share

-- Fields of a job by what they are read for.
local QUEUE_FIELDS = {
  'state', 'fence', 'deadline_ms', 'watchers', 'model', 'version', 'size', 'place', 'lane', 'tenant', 'weight', 'worker',
}
local CLAIM_FIELDS = {
  'state', 'deadline_ms', 'watchers', 'model', 'version', 'size', 'choices', 'place', 'lane', 'tenant', 'charge',
  'lost_leases', 'passed_over_ms', 'kept_by', 'kept_until_ms',
}
local LOSS_FIELDS = {
  'state', 'watchers', 'model', 'size', 'place', 'lane', 'tenant', 'weight', 'charge', 'lost_leases', 'worker',
  'lease_ms', 'poison_key',
}
local INDEX_FIELDS = {
  'state', 'model', 'place', 'lane', 'tenant', 'weight', 'size', 'lease_ms', 'deadline_ms', 'grace_ms', 'retention_ms',
}
local STATUS_FIELDS = { 'state', 'end_position', 'outcome', 'prompt_tokens', 'model' }
local END_FIELDS = {
  'model', 'size', 'tenant', 'lane', 'weight', 'claimed_ms', 'prompt_tokens', 'end_position', 'retention_ms', 'worker',
}

------------------------------------------------------------------------------------------------------------------------
-- Parts

-- A shard at one moment. `news` gathers what gateways are to hear: names of gateways -> pieces of framed JobUpdates.
local function open_shard(keys)
  local time = redis.call('TIME')
  return { root = keys[1], now_ms = time[1] * 1000 + math.floor(time[2] / 1000), news = {} }
end

local function key_of(shard, kind, name)
  if name then
    return shard.root .. ':' .. kind .. ':' .. name
  end
  return shard.root .. ':' .. kind
end

-- The named fields of a job's hash, and its id. Absent ones are false; no `state` means no such job.
local function get_job(shard, id, names)
  local values = redis.call('HMGET', key_of(shard, 'job', id), unpack(names))
  local job = { id = id }
  for index, name in ipairs(names) do
    job[name] = values[index]
  end
  return job
end

local function is_final(state)
  return state ~= 'waiting' and state ~= 'running'
end

local function is_overdue(shard, job)
  return job.deadline_ms and tonumber(job.deadline_ms) <= shard.now_ms
end

local function is_solo(job)
  return (tonumber(job.charge) or 0) >= SOLO_CHARGE or (tonumber(job.lost_leases) or 0) >= SOLO_LOST_LEASES
end

-- The job's watchers are to hear of this framed JobUpdate, which may come in two pieces.
local function tell(shard, watchers, update, rest)
  watchers = watchers or ''
  local pieces = shard.news[watchers]
  if not pieces then
    pieces = {}
    shard.news[watchers] = pieces
  end
  pieces[#pieces + 1] = update
  pieces[#pieces + 1] = rest
end

-- Hands gateways what `tell` gathered, as UpdateBatches: framed updates in a row are one.
local function send_news(shard)
  for watchers, pieces in pairs(shard.news) do
    local batch = table.concat(pieces)
    for gateway in string.gmatch(watchers, '%S+') do
      local updates = key_of(shard, 'updates', gateway)
      redis.call('XADD', updates, 'MAXLEN', '~', UPDATES_KEPT, '*', 'batch', batch)
      redis.call('PEXPIRE', updates, UPDATES_TTL_MS)
    end
  end
end

-- A framed JobUpdate that holds a job's id and no news: its reader looks the job up. Ids are far shorter than 126
-- bytes, so each length is one byte.
local function notice_of(id)
  local update = '\10' .. string.char(#id) .. id
  return '\10' .. string.char(#update) .. update
end

-- A job that has a grace ends this long, and its grace, after the last sign that somebody watches it.
local function keep_watched(shard, id, watch_ms)
  local grace_ms = redis.call('HGET', key_of(shard, 'job', id), 'grace_ms')
  if grace_ms then
    redis.call('ZADD', key_of(shard, 'watched'), 'XX', shard.now_ms + watch_ms + grace_ms, id)
  end
end

local function is_watcher(watchers, gateway)
  return string.find(' ' .. (watchers or '') .. ' ', ' ' .. gateway .. ' ', 1, true) ~= nil
end

local function add_watcher(shard, id, gateway)
  local job_key = key_of(shard, 'job', id)
  local watchers = redis.call('HGET', job_key, 'watchers') or ''
  if not is_watcher(watchers, gateway) then
    redis.call('HSET', job_key, 'watchers', watchers .. ' ' .. gateway)
  end
  keep_watched(shard, id, WATCH_TTL_MS)
end

-- The gateway is no watcher of the job. Returns whether it was the last.
local function remove_watcher(shard, id, gateway)
  local job_key = key_of(shard, 'job', id)
  local others = {}
  for watcher in string.gmatch(redis.call('HGET', job_key, 'watchers') or '', '%S+') do
    if watcher ~= gateway then
      others[#others + 1] = watcher
    end
  end
  redis.call('HSET', job_key, 'watchers', table.concat(others, ' '))
  return #others == 0
end

-- One token in the list wakes one worker; that one's claim wakes the next if there is more to do.
local function wake_worker(shard, model)
  local wake = key_of(shard, 'wake', model)
  if redis.call('EXISTS', wake) == 0 then
    redis.call('LPUSH', wake, '1')
  end
  redis.call('PEXPIRE', wake, WAKE_TTL_MS)
end

-- What waits for a model and what of it is a tenant's, in jobs and tokens, changes by one job of this size.
local function count_waiting(shard, job, sign)
  local counts = {
    { key_of(shard, 'waiting_tokens'), job.model, job.size },
    { key_of(shard, 'tenants', job.model), job.tenant, 1 },
    { key_of(shard, 'tenant_jobs'), job.tenant, 1 },
    { key_of(shard, 'tenant_tokens'), job.tenant, job.size },
  }
  for _, count in ipairs(counts) do
    local key, field, number = unpack(count)
    if redis.call('HINCRBY', key, field, sign * number) <= 0 then
      redis.call('HDEL', key, field)
    end
  end
  if not redis.call('HGET', key_of(shard, 'tenant_jobs'), job.tenant) then
    redis.call('HDEL', key_of(shard, 'tenant_weights'), job.tenant)
  elseif sign > 0 then
    redis.call('HSET', key_of(shard, 'tenant_weights'), job.tenant, job.weight)
  end
end

local function enter_waiting(shard, job, place)
  if redis.call('ZADD', key_of(shard, 'waiting', job.model), place, job.id) == 1 then
    count_waiting(shard, job, 1)
  end
  wake_worker(shard, job.model)
end

local function leave_waiting(shard, job)
  if redis.call('ZREM', key_of(shard, 'waiting', job.model), job.id) == 1 then
    count_waiting(shard, job, -1)
  end
end

-- An id without a job leaves the index. What the job counted for is not known any more, so all is counted anew.
local function drop_waiting(shard, model, id)
  redis.call('HSET', key_of(shard, 'counters'), 'must_recount', 1)
  return redis.call('ZREM', key_of(shard, 'waiting', model), id)
end

-- How many jobs wait for a model, and how many tokens they ask for.
local function waiting_of(shard, model)
  local tokens = redis.call('HGET', key_of(shard, 'waiting_tokens'), model)
  return redis.call('ZCARD', key_of(shard, 'waiting', model)), tonumber(tokens) or 0
end

local function enter_running(shard, job)
  redis.call('ZADD', key_of(shard, 'running', job.model), 'NX', shard.now_ms, job.id)
end

local function leave_running(shard, job)
  redis.call('ZREM', key_of(shard, 'running', job.model), job.id)
end

local function running_of(shard, model)
  return redis.call('ZCARD', key_of(shard, 'running', model))
end

-- Tokens that so many jobs at the head of a model's queue ask for, taken as so many average ones.
local function tokens_of_first(shard, model, num_jobs)
  local jobs, tokens = waiting_of(shard, model)
  return jobs > 0 and math.ceil(tokens * num_jobs / jobs) or 0
end

-- Jobs ahead of a waiting one, and tokens they ask for; 0 for any other.
local function ahead_of(shard, id, job)
  local jobs = job.state == 'waiting' and redis.call('ZRANK', key_of(shard, 'waiting', job.model), id) or 0
  return jobs, jobs > 0 and tokens_of_first(shard, job.model, jobs) or 0
end

------------------------------------------------------------------------------------------------------------------------
-- Fairness: start-time fair queueing
--
-- Every job costs its tenant virtual time: its tokens, divided by the tenant's weight. A job starts where the tenant's
-- jobs before it ended, or now if that is past, and jobs are served in the order of their starts. Virtual time is the
-- start of the job served last. So tenants with work share what is served by weight, whoever asks for more only waits
-- longer itself, and whoever was idle comes next but has saved up nothing.
--
--   tenant a   |-- a1 --|-- a2 --|-- a3 --|-- a4 --|        order: a1 b1 a2 b2 a3 a4
--   tenant b       |-- b1 --|-- b2 --|
--                  now
--
-- Priority orders a tenant's own jobs: each lane has an end of its own, and a job moves the ends of its lane and of all
-- less urgent ones. So an urgent job passes the tenant's others, while all lanes together get no more than the tenant's
-- share. Between tenants a lane is a head start, no more.
--
-- `flows:<model>` holds the end of each lane of each tenant, as `<lane><tenant>`, and virtual time, as `now`.

-- How a command takes a bound that is itself left out. Joined to a text as it is, a number would be rounded.
local function below(score)
  return '(' .. string.format('%.17g', score)
end

local function virtual_now(shard, model)
  local now = redis.call('ZSCORE', key_of(shard, 'flows', model), 'now')
  if not now then -- forgotten after a long rest, perhaps of a queue that was not empty
    now = redis.call('ZRANGE', key_of(shard, 'waiting', model), 0, 0, 'WITHSCORES')[2]
  end
  return tonumber(now) or 0
end

-- Virtual time goes on to the start of a job that is served.
local function advance_now(shard, model, start)
  local flows = key_of(shard, 'flows', model)
  redis.call('ZADD', flows, 'GT', start, 'now')
  redis.call('ZREMRANGEBYSCORE', flows, '-inf', below(virtual_now(shard, model))) -- idle tenants owe nothing
  redis.call('PEXPIRE', flows, FLOWS_TTL_MS)
end

local function start_of(shard, job)
  local finish = redis.call('ZSCORE', key_of(shard, 'flows', job.model), job.lane .. job.tenant)
  return math.max(virtual_now(shard, job.model) + ARRIVAL, tonumber(finish) or 0)
end

-- The tenant has spent what the job costs at most.
local function charge(shard, job)
  local flows = key_of(shard, 'flows', job.model)
  local now = virtual_now(shard, job.model) + ARRIVAL
  for lane = tonumber(job.lane), LAST_LANE do
    local finish = tonumber(redis.call('ZSCORE', flows, lane .. job.tenant)) or 0
    redis.call('ZADD', flows, math.max(now, finish) + job.size / job.weight, lane .. job.tenant)
  end
  redis.call('ZADD', flows, now, 'now')
  redis.call('PEXPIRE', flows, FLOWS_TTL_MS)
end

-- The tenant gets back what the job was charged and did not use. One that is idle by now owes nothing and gets nothing.
local function refund(shard, job)
  local flows = key_of(shard, 'flows', job.model)
  local used = job.claimed_ms and job.prompt_tokens + job.end_position or 0
  for lane = tonumber(job.lane), LAST_LANE do
    redis.call('ZADD', flows, 'XX', 'INCR', (used - job.size) / job.weight, lane .. job.tenant)
  end
end

local function place_of(job, start)
  return start + job.lane * HEAD_START
end

------------------------------------------------------------------------------------------------------------------------
-- Life of a job

local function set_lease(shard, id, lease_ms)
  redis.call('ZADD', key_of(shard, 'leases'), shard.now_ms + lease_ms, id)
end

-- The job is in a final state, in no index, and goes after its retention. `update` is what its gateways hear.
local function end_job(shard, job, state, update)
  local job_key = key_of(shard, 'job', job.id)
  local ended = get_job(shard, job.id, END_FIELDS)
  if job.state == 'waiting' then
    leave_waiting(shard, ended)
  else
    redis.call('SREM', key_of(shard, 'suspects', ended.worker), job.id)
    leave_running(shard, ended)
  end
  refund(shard, ended)
  redis.call('ZREM', key_of(shard, 'leases'), job.id)
  redis.call('ZREM', key_of(shard, 'deadlines'), job.id)
  redis.call('ZREM', key_of(shard, 'watched'), job.id)
  redis.call('HSET', job_key, 'state', state)
  redis.call('PEXPIRE', job_key, ended.retention_ms)
  redis.call('PEXPIRE', key_of(shard, 'log', job.id), ended.retention_ms)
  tell(shard, job.watchers, update)
end

-- A running job waits again, at its old place, and nobody holds it.
local function requeue(shard, job)
  local job_key = key_of(shard, 'job', job.id)
  redis.call('ZREM', key_of(shard, 'leases'), job.id)
  redis.call('HSET', job_key, 'state', 'waiting')
  redis.call('HDEL', job_key, 'fence')
  leave_running(shard, job)
  -- It was served once, so its place is past; unless virtual time itself was forgotten meanwhile.
  enter_waiting(shard, job, math.min(job.place, place_of(job, virtual_now(shard, job.model))))
end

-- The entries of a job's log behind position `after`, as LogEntry bytes.
local function entries_after(shard, id, after)
  local entries = {}
  for index, entry in ipairs(redis.call('XRANGE', key_of(shard, 'log', id), '(' .. after .. '-0', '+')) do
    entries[index] = entry[2][2]
  end
  return entries
end

------------------------------------------------------------------------------------------------------------------------
-- Shards
--
-- A job's shard follows from its id and the number of shards: by another number it is looked for where it is not. So
-- each shard knows by which one its jobs came, and takes no job by another. The number changes while there are none.

-- The number of shards that this one's jobs are spread over; false if nobody has said.
local function known_spread(shard)
  return redis.call('HGET', key_of(shard, 'counters'), 'num_shards')
end

-- The same; the number given, if nobody has said before.
local function spread_over(shard, num_shards)
  local known = known_spread(shard)
  if not known then
    redis.call('HSET', key_of(shard, 'counters'), 'num_shards', num_shards)
  end
  return known or num_shards
end

local function has_jobs(shard)
  return redis.call('EXISTS', key_of(shard, 'waiting_tokens'), key_of(shard, 'leases')) > 0
end

-- ARGV  1 number of shards that jobs are to be spread over from now on
-- Returns the number that they are spread over: another one as long as jobs that came by it wait or run.
local function spread(keys, args)
  local shard = open_shard(keys)
  if not has_jobs(shard) then
    redis.call('HSET', key_of(shard, 'counters'), 'num_shards', args[1])
  end
  return tonumber(spread_over(shard, args[1]))
end

-- Returns {the number of shards that jobs are spread over, 0 if nobody has said, 1 if some wait or run, else 0}.
local function spreading(keys)
  local shard = open_shard(keys)
  return { tonumber(known_spread(shard) or 0), has_jobs(shard) and 1 or 0 }
end

------------------------------------------------------------------------------------------------------------------------
-- The gateway's side

-- Whether one more of this size is too much. Whatever its size, one alone never is.
local function exceeds(limit, present, size)
  return limit and present > 0 and present + size > limit
end

-- The part by weight that is the tenant's, among all who have jobs that wait for the model.
local function share_of(shard, job)
  local total = 0 + job.weight
  local tenants = redis.call('HKEYS', key_of(shard, 'tenants', job.model))
  for first = 1, #tenants, MAX_UNPACKED do
    local last = math.min(first + MAX_UNPACKED - 1, #tenants)
    local weights = redis.call('HMGET', key_of(shard, 'tenant_weights'), unpack(tenants, first, last))
    for index, weight in ipairs(weights) do
      if tenants[first + index - 1] ~= job.tenant then
        total = total + (weight or 0)
      end
    end
  end
  return job.weight / total
end

-- Whether the queue has no place for a job: it is full, and the tenant has its share of it, or the reserve is used up.
-- So whoever fills it keeps others from nothing: they are let in, and it is refused until what waits is less again.
local function is_full_for(shard, job, limit, present, tenants, size)
  if not exceeds(limit, present, size) then
    return false
  end
  return exceeds(limit * RESERVE, present, size) or exceeds(limit * share_of(shard, job), tenants, size)
end

-- Why a new job is not let in, as the function's answer; nil if it is.
local function refusal_of(shard, job, place, limits)
  local jobs, tokens = waiting_of(shard, job.model)
  local tenant_jobs = tonumber(redis.call('HGET', key_of(shard, 'tenant_jobs'), job.tenant)) or 0
  local tenant_tokens = tonumber(redis.call('HGET', key_of(shard, 'tenant_tokens'), job.tenant)) or 0
  if is_full_for(shard, job, limits.jobs, jobs, tenant_jobs, 1)
      or is_full_for(shard, job, limits.tokens, tokens, tenant_tokens, job.size) then
    return { 'queue_full', jobs, tokens }
  end
  if exceeds(limits.tenant_jobs, tenant_jobs, 1) or exceeds(limits.tenant_tokens, tenant_tokens, job.size) then
    return { 'tenant_full', tenant_jobs, tenant_tokens }
  end
  jobs = redis.call('ZCOUNT', key_of(shard, 'waiting', job.model), '-inf', below(place))
  tokens = tokens_of_first(shard, job.model, jobs)
  if limits.tokens_ahead and tokens > limits.tokens_ahead then
    return { 'too_much_ahead', jobs, tokens }
  end
end

-- ARGV  1 job id   2 Job bytes   3 digest   4 model   5 job version   6 prompt tokens   7 size   8 lane
--       9 tenant   10 weight of the tenant   11 timeout_ms   12 retention_ms   13 gateway
--       Then the limits, of what may wait for the model:   14 jobs   15 tokens,
--       of what may wait of the tenant:   16 jobs   17 tokens,   18 of tokens that may wait ahead of this job.
--       19 choices   20 digest of tenant, model and prompt
--       21 grace_ms: how long it runs on when nobody watches it any more
--       22 number of shards that jobs are spread over
--       11, 14 to 18 and 21 are empty for none, and so is 13 if nobody watches.
-- Returns {'accepted', 1, 'waiting', jobs ahead, tokens ahead} for a new job,
-- {'accepted', 0, state, jobs ahead, tokens ahead, Job bytes} for one that was there before, {'conflict'},
-- {'poisoned'}, {'queue_full', jobs, tokens}, {'tenant_full', jobs, tokens}, {'too_much_ahead', jobs, tokens}, or
-- {'spread_otherwise', number of shards} if that is another.
local function enqueue(keys, args)
  local shard = open_shard(keys)
  local job = {
    id = args[1], state = 'waiting', bytes = args[2], digest = args[3], model = args[4], version = args[5],
    prompt_tokens = args[6], size = args[7], lane = args[8], tenant = args[9], weight = args[10],
    timeout_ms = tonumber(args[11]), retention_ms = args[12], gateway = args[13], choices = args[19],
    poison_key = key_of(shard, 'poison', args[20]), grace_ms = tonumber(args[21]),
  }
  local limits = {
    jobs = tonumber(args[14]), tokens = tonumber(args[15]), tenant_jobs = tonumber(args[16]),
    tenant_tokens = tonumber(args[17]), tokens_ahead = tonumber(args[18]),
  }
  local job_key, is_watched = key_of(shard, 'job', job.id), job.gateway ~= ''

  local known = get_job(shard, job.id, { 'state', 'digest', 'model', 'job' })
  if known.state then
    if known.digest ~= job.digest then
      return { 'conflict' }
    end
    if is_watched then
      add_watcher(shard, job.id, job.gateway)
    end
    -- A write in any case: WAIT on this connection is to cover the job, which another connection may have written.
    redis.call('HSET', job_key, 'digest', known.digest)
    local jobs_ahead, tokens_ahead = ahead_of(shard, job.id, known)
    return { 'accepted', 0, known.state, jobs_ahead, tokens_ahead, known.job }
  end

  local num_shards = spread_over(shard, args[22])
  if num_shards ~= args[22] then
    return { 'spread_otherwise', tonumber(num_shards) }
  end
  if redis.call('EXISTS', job.poison_key) == 1 then
    return { 'poisoned' }
  end
  local place = place_of(job, start_of(shard, job))
  local refusal = refusal_of(shard, job, place, limits)
  if refusal then
    return refusal
  end

  redis.call('HSET', job_key,
    'state', job.state, 'job', job.bytes, 'digest', job.digest, 'model', job.model, 'version', job.version,
    'prompt_tokens', job.prompt_tokens, 'size', job.size, 'lane', job.lane, 'tenant', job.tenant, 'weight', job.weight,
    'place', string.format('%.17g', place), 'end_position', 0, 'watchers', job.gateway, 'enqueued_ms', shard.now_ms,
    'retention_ms', job.retention_ms, 'choices', job.choices, 'poison_key', job.poison_key)
  if job.timeout_ms then
    local deadline_ms = shard.now_ms + job.timeout_ms
    redis.call('HSET', job_key, 'deadline_ms', deadline_ms)
    redis.call('ZADD', key_of(shard, 'deadlines'), deadline_ms, job.id)
  end
  if job.grace_ms then
    redis.call('HSET', job_key, 'grace_ms', job.grace_ms)
    local watched_until_ms = shard.now_ms + (is_watched and WATCH_TTL_MS or 0)
    redis.call('ZADD', key_of(shard, 'watched'), watched_until_ms + job.grace_ms, job.id)
  end
  charge(shard, job)
  enter_waiting(shard, job, place)
  return { 'accepted', 1, job.state, ahead_of(shard, job.id, job) }
end

local function snapshot_of(shard, id)
  local job = get_job(shard, id, STATUS_FIELDS)
  if not job.state then
    return false
  end
  local bytes = redis.call('HGET', key_of(shard, 'job', id), 'job')
  local jobs_ahead, tokens_ahead = ahead_of(shard, id, job)
  return { job.state, jobs_ahead, tokens_ahead, tonumber(job.end_position), job.outcome, bytes }
end

-- ARGV  1 job id   2 gateway, which watches the job from now on
-- Returns {state, jobs ahead, tokens ahead, end position, Outcome bytes or nil, Job bytes}, or nil if there is no such job.
local function attach(keys, args)
  local shard = open_shard(keys)
  if redis.call('EXISTS', key_of(shard, 'job', args[1])) == 1 then
    add_watcher(shard, args[1], args[2])
  end
  return snapshot_of(shard, args[1])
end

-- ARGV  1 job id
-- Returns the same as attach.
local function status(keys, args)
  return snapshot_of(open_shard(keys), args[1])
end

-- ARGV  1 gateway, then the ids of jobs that it watches still
-- Returns for each 1 if it has not ended and does not name the gateway as a watcher, else 0. Perhaps the gateway left it
-- while this was on its way, perhaps Redis has lost that it came.
local function keep_watching(keys, args)
  local shard, gateway = open_shard(keys), args[1]
  local unwatched = {}
  for index = 2, #args do
    local job = get_job(shard, args[index], { 'state', 'watchers' })
    local may_run, is_watched = job.state and not is_final(job.state), is_watcher(job.watchers, gateway)
    if may_run and is_watched then
      keep_watched(shard, job.id, WATCH_TTL_MS)
    end
    unwatched[index - 1] = may_run and not is_watched and 1 or 0
  end
  return unwatched
end

-- ARGV  1 job id   2 position
-- Returns {state, end position, Outcome bytes or nil, prompt tokens, {LogEntry bytes behind the position ...}}, or nil.
local function read(keys, args)
  local shard = open_shard(keys)
  local job = get_job(shard, args[1], STATUS_FIELDS)
  if not job.state then
    return false
  end
  return {
    job.state, tonumber(job.end_position), job.outcome, tonumber(job.prompt_tokens),
    entries_after(shard, args[1], args[2]),
  }
end

-- ARGV  1 job id
-- Returns the state the job is in now, or nil. Its worker learns of the end from its next push.
local function cancel(keys, args)
  local shard = open_shard(keys)
  local job = get_job(shard, args[1], QUEUE_FIELDS)
  if not job.state or is_final(job.state) then
    return job.state
  end
  end_job(shard, job, 'cancelled', notice_of(job.id))
  send_news(shard)
  return 'cancelled'
end

-- ARGV  1 job id   2 gateway, which does not watch the job any more
-- Returns the state the job is in now, or nil. If nobody watches it any more its grace begins, or it ends if it has none.
local function unwatch(keys, args)
  local shard = open_shard(keys)
  local job = get_job(shard, args[1], QUEUE_FIELDS)
  if not job.state or is_final(job.state) then
    return job.state
  end
  if remove_watcher(shard, job.id, args[2]) then
    if redis.call('HGET', key_of(shard, 'job', job.id), 'grace_ms') == '0' then
      end_job(shard, job, 'cancelled', notice_of(job.id))
      send_news(shard)
      return 'cancelled'
    end
    keep_watched(shard, job.id, 0)
  end
  return job.state
end

-- ARGV  1 model   2 name of the queue of what it has to score
-- Returns {jobs waiting, tokens they ask for, jobs running, jobs dead, jobs to be scored waiting, tokens they ask for,
-- {WorkerStatus bytes, its age in ms ...}}. What is to be scored is not among the others that wait. Dead jobs and
-- workers are those of all models.
local function load(keys, args)
  local shard = open_shard(keys)
  local chats, scorings = args[1], args[2]
  local workers = {}
  local heard_since_ms = shard.now_ms - WORKER_TTL_MS
  local heard = redis.call('ZRANGEBYSCORE', key_of(shard, 'heartbeats'), heard_since_ms, '+inf', 'WITHSCORES')
  for index = 1, #heard, 2 do
    workers[#workers + 1] = redis.call('HGET', key_of(shard, 'workers'), heard[index])
    workers[#workers + 1] = shard.now_ms - heard[index + 1]
  end
  local waiting_jobs, waiting_tokens = waiting_of(shard, chats)
  local scoring_jobs, scoring_tokens = waiting_of(shard, scorings)
  local dead_jobs = redis.call('ZCARD', key_of(shard, 'dead'))
  local running_jobs = running_of(shard, chats) + running_of(shard, scorings)
  return { waiting_jobs, waiting_tokens, running_jobs, dead_jobs, scoring_jobs, scoring_tokens, workers }
end

------------------------------------------------------------------------------------------------------------------------
-- The worker's side

-- What a worker needs to run a job it has just claimed.
local function describe_claim(shard, id)
  local job = get_job(shard, id,
    { 'fence', 'fences', 'job', 'end_position', 'lost_leases', 'enqueued_ms', 'claimed_ms', 'charge' })
  return {
    id, job.fence, job.job, entries_after(shard, id, 0), tonumber(job.end_position),
    1 + (tonumber(job.lost_leases) or 0), job.claimed_ms - job.enqueued_ms, is_solo(job) and 1 or 0,
    job.fences == '1' and 1 or 0,
  }
end

-- The ids of the jobs that this very claim took before, if it was made before; else nil.
local function ids_of_repeated_claim(shard, worker, claim_id)
  local words = string.gmatch(redis.call('GET', key_of(shard, 'claim', worker)) or '', '%S+')
  if words() ~= claim_id then
    return nil
  end
  local ids = {}
  for id in words do
    local job = get_job(shard, id, { 'state', 'fence' })
    if job.state == 'running' and string.sub(job.fence, -#claim_id) == claim_id then
      ids[#ids + 1] = id
    end
  end
  return ids
end

local function take(shard, job, claim)
  local job_key = key_of(shard, 'job', job.id)
  local fence = redis.call('HINCRBY', job_key, 'fences', 1) .. '-' .. claim.id
  redis.call('HSET', job_key, 'state', 'running', 'fence', fence, 'lease_ms', claim.lease_ms, 'worker', claim.worker)
  redis.call('HSETNX', job_key, 'claimed_ms', shard.now_ms)
  if job.passed_over_ms then
    redis.call('HDEL', job_key, 'passed_over_ms', 'kept_by', 'kept_until_ms')
  end
  leave_waiting(shard, job)
  enter_running(shard, job)
  advance_now(shard, job.model, job.place - job.lane * HEAD_START)
  set_lease(shard, job.id, claim.lease_ms)
end

-- The claimed jobs are suspects: should the worker be lost before they have a token from it, it is lost through them.
local function suspect(shard, worker, ids)
  local suspects = key_of(shard, 'suspects', worker)
  redis.call('SADD', suspects, unpack(ids))
  redis.call('PEXPIRE', suspects, SUSPECTS_TTL_MS)
end

-- Whether the worker takes nothing behind this job, which has no room there now, so that room comes free for it.
--
-- A job without room is passed over, so that it does not hold up others. Once that has lasted, one worker keeps itself
-- for it, while others go on passing it over.
local function keeps_itself_for(shard, claim, job)
  local job_key = key_of(shard, 'job', job.id)
  if not job.passed_over_ms then
    redis.call('HSET', job_key, 'passed_over_ms', shard.now_ms)
    return false
  end
  if shard.now_ms - job.passed_over_ms < PATIENCE_MS then
    return false
  end
  if job.kept_by and job.kept_by ~= claim.worker and tonumber(job.kept_until_ms) > shard.now_ms then
    return false
  end
  redis.call('HSET', job_key, 'kept_by', claim.worker, 'kept_until_ms', shard.now_ms + KEPT_MS)
  return true
end

-- Takes jobs in the queue's order. Passes over those of a version this worker does not know, and, for a while, over
-- those that it has no room for. Returns the ids of what was taken, and whether the worker keeps itself for one of those.
local function take_jobs(shard, claim)
  local waiting = key_of(shard, 'waiting', claim.model)
  local ids, passed_over = {}, 0
  local tokens, choices = claim.max_tokens, claim.max_choices
  for _, id in ipairs(redis.call('ZRANGE', waiting, 0, CLAIM_WINDOW - 1)) do
    if #ids == claim.max_jobs then
      break
    end
    local job = get_job(shard, id, CLAIM_FIELDS)
    local solo = is_solo(job)
    local needed_tokens = job.size and job.size + job.choices * claim.choice_tokens
    if not job.state then
      drop_waiting(shard, claim.model, id)
    elseif job.state ~= 'waiting' then
      leave_waiting(shard, job)
    elseif is_overdue(shard, job) then
      end_job(shard, job, 'expired', notice_of(id))
    elseif tonumber(job.version) > claim.max_version then
      -- Left to a worker that knows it.
    elseif needed_tokens <= tokens and tonumber(job.choices) <= choices
        and (not solo or claim.is_idle and #ids == 0) then
      tokens, choices = tokens - needed_tokens, choices - job.choices
      take(shard, job, claim)
      ids[#ids + 1] = id
      if solo then
        break
      end
    elseif keeps_itself_for(shard, claim, job) then
      return ids, true
    elseif passed_over == PASSED_OVER then
      break
    else
      passed_over = passed_over + 1
    end
  end
  return ids, false
end

-- ARGV  1 worker   2 claim id, new for each claim, the same when a claim is repeated because its answer was lost
--       3 model   4 lease_ms   5 most jobs   6 most tokens   7 most choices   8 newest job version the worker knows
--       9 tokens that each choice takes beside those of its job's size   10 1 if the worker has no job, else 0
--       11 number of shards that jobs are spread over
-- Returns 1 if the worker keeps itself for a job that it has no room for, else 0; a list of
-- {job id, fence, Job bytes, {LogEntry bytes ...}, end position, attempt from 1, waited_ms, 1 if the job is to run
-- alone, else 0, 1 if it was never claimed before, else 0}; and the number of shards that jobs are spread over: whoever
-- has another gets none.
local function claim(keys, args)
  local shard = open_shard(keys)
  local claim = {
    worker = args[1], id = args[2], model = args[3], lease_ms = tonumber(args[4]), max_jobs = tonumber(args[5]),
    max_tokens = tonumber(args[6]), max_choices = tonumber(args[7]), max_version = tonumber(args[8]),
    choice_tokens = tonumber(args[9]), is_idle = args[10] == '1',
  }
  local ids, is_kept = ids_of_repeated_claim(shard, claim.worker, claim.id), false
  local num_shards = not ids and known_spread(shard) or args[11]
  if num_shards ~= args[11] then
    return { 0, {}, tonumber(num_shards) }
  end
  if not ids then
    ids, is_kept = take_jobs(shard, claim)
    if #ids > 0 then
      local last = key_of(shard, 'claim', claim.worker)
      redis.call('SET', last, claim.id .. ' ' .. table.concat(ids, ' '), 'PX', claim.lease_ms)
      suspect(shard, claim.worker, ids)
      if redis.call('EXISTS', key_of(shard, 'waiting', claim.model)) == 1 then
        wake_worker(shard, claim.model)
      end
    end
    send_news(shard)
  end

  local claims = {}
  for index, id in ipairs(ids) do
    claims[index] = describe_claim(shard, id)
  end
  return { is_kept and 1 or 0, claims, tonumber(num_shards) }
end

-- Why an item of a push is refused; 'ok' if it was applied before, nil if it is to be applied now. Three guards stand
-- before the log: the fence, the position, and the stream's own rule that ids grow (append).
local function verdict(shard, job, fence, start, stop)
  if job.state == 'cancelled' or job.state == 'expired' then
    return job.state
  end
  if not job.state or job.fence ~= fence then
    return 'fenced'
  end
  if job.state == 'running' and is_overdue(shard, job) then
    end_job(shard, job, 'expired', notice_of(job.id))
    return 'expired'
  end
  if job.state == 'running' and job.end_position == start then
    return nil
  end
  return job.end_position == stop and 'ok' or 'position'
end

-- Whether the entry is in the log now, and on its way to the job's watchers.
local function append(shard, job, stop, head, entry)
  local reply = redis.pcall('XADD', shard.root .. ':log:' .. job.id, stop .. '-0', 'entry', entry)
  if type(reply) == 'table' then
    return false
  end
  redis.call('HSET', shard.root .. ':job:' .. job.id, 'end_position', stop)
  tell(shard, job.watchers, head, entry)
  return true
end

-- The job has tokens from this worker, so it did not kill it. Once a job runs alone, its charge is its own and stays.
local function acquit(shard, worker, id)
  local job_key = key_of(shard, 'job', id)
  redis.call('SREM', key_of(shard, 'suspects', worker), id)
  if not is_solo(get_job(shard, id, { 'charge', 'lost_leases' })) then
    redis.call('HDEL', job_key, 'charge')
  end
end

-- ARGV  1 lease_ms   2 worker   3 how many items, then seven for each item:
--       1 job id   2 fence   3 start position   4 end position   5 head of the entry's JobUpdate   6 LogEntry bytes
--       7 '1' if the lease is to be renewed, else empty
--       then four for each outcome:
--       1 number of its item, from 1   2 head of the outcome's JobUpdate   3 Outcome bytes   4 state it means
--       5 and 6 of an item are empty when there is no entry. An item that only renews has no positions either. A head
--       is everything of a framed JobUpdate before the entry or outcome itself.
-- Returns one of 'ok', 'fenced', 'cancelled', 'expired', 'position' for each item.
--
-- This runs for every job at every step: it is written for speed where that costs little clarity.
local function push(keys, args)
  local shard = open_shard(keys)
  local lease_end_ms, worker, num_items = shard.now_ms + args[1], args[2], tonumber(args[3])
  local outcomes = {}
  for base = 4 + 7 * num_items, #args, 4 do
    outcomes[tonumber(args[base])] = base
  end

  local statuses, renewed = {}, {}
  for number = 1, num_items do
    local base = 7 * number - 3
    local id, start, stop, entry, renews = args[base], args[base + 2], args[base + 3], args[base + 5], args[base + 6]
    local job_key = shard.root .. ':job:' .. id
    local values = redis.call('HMGET', job_key, 'state', 'fence', 'end_position', 'deadline_ms', 'watchers')
    local job = {
      id = id, state = values[1], fence = values[2], end_position = values[3], deadline_ms = values[4],
      watchers = values[5],
    }
    if stop == '' then
      start, stop = job.end_position, job.end_position -- only renews, and claims no position
    end

    local status = verdict(shard, job, args[base + 1], start, stop)
    local outcome = outcomes[number]
    if not status and entry ~= '' and not append(shard, job, stop, args[base + 4], entry) then
      status = 'position'
    end
    if renews ~= '' and entry ~= '' and (not status or status == 'ok') then
      acquit(shard, worker, id)
    end
    if not status and outcome then
      redis.call('HSET', job_key, 'outcome', args[outcome + 2])
      end_job(shard, job, args[outcome + 3], args[outcome + 1] .. args[outcome + 2])
    elseif renews ~= '' and job.state == 'running' and (not status or status == 'ok') then
      renewed[#renewed + 1] = lease_end_ms
      renewed[#renewed + 1] = id
    end
    statuses[number] = status or 'ok'
  end

  if #renewed > 0 then
    redis.call('ZADD', shard.root .. ':leases', unpack(renewed))
    redis.call('PEXPIRE', key_of(shard, 'suspects', worker), SUSPECTS_TTL_MS)
  end
  send_news(shard)
  return statuses
end

-- ARGV  job id and fence, for each job to give back
-- Returns how many wait again now. No attempt is charged.
local function release(keys, args)
  local shard = open_shard(keys)
  local released = 0
  for index = 1, #args, 2 do
    local job = get_job(shard, args[index], QUEUE_FIELDS)
    if job.state == 'running' and job.fence == args[index + 1] then
      redis.call('SREM', key_of(shard, 'suspects', job.worker), job.id)
      requeue(shard, job)
      released = released + 1
    end
  end
  return released
end

-- ARGV  1 worker   2 WorkerStatus bytes
-- Returns nothing. Workers that have been silent for long are forgotten.
local function heartbeat(keys, args)
  local shard = open_shard(keys)
  local workers, heartbeats = key_of(shard, 'workers'), key_of(shard, 'heartbeats')
  redis.call('HSET', workers, args[1], args[2])
  redis.call('ZADD', heartbeats, shard.now_ms, args[1])
  for _, silent in ipairs(redis.call('ZRANGEBYSCORE', heartbeats, '-inf', shard.now_ms - WORKER_TTL_MS)) do
    redis.call('HDEL', workers, silent)
    redis.call('ZREM', heartbeats, silent)
  end
  redis.call('PEXPIRE', workers, WORKER_TTL_MS)
  redis.call('PEXPIRE', heartbeats, WORKER_TTL_MS)
end

------------------------------------------------------------------------------------------------------------------------
-- Upkeep

-- Gives every lease its whole length again, counted from now, and every job its watchers. Returns how many leases there
-- are.
local function grant_amnesty(shard)
  local ids = redis.call('ZRANGE', key_of(shard, 'leases'), 0, -1)
  for _, id in ipairs(ids) do
    set_lease(shard, id, redis.call('HGET', key_of(shard, 'job', id), 'lease_ms') or 0)
  end
  for _, id in ipairs(redis.call('ZRANGE', key_of(shard, 'watched'), 0, -1)) do
    keep_watched(shard, id, WATCH_TTL_MS)
  end
  return #ids
end

-- Shortens leases that would outlive any honest one, as after Redis's clock was set back.
local function cap_leases(shard, limit)
  local leases, latest_ms = key_of(shard, 'leases'), shard.now_ms + MAX_LEASE_MS
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '(' .. latest_ms, '+inf', 'LIMIT', 0, limit)) do
    redis.call('ZADD', leases, latest_ms, id)
  end
end

-- Whether Redis was restarted, or another took its place, since the last sweep.
local function is_another_run(shard)
  local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  local counters = key_of(shard, 'counters')
  local swept_run = redis.call('HGET', counters, 'swept_run')
  redis.call('HSET', counters, 'swept_run', run)
  return swept_run and swept_run ~= run
end

-- What the loss of its worker adds to a job's charge: what the worker was doing says which jobs may have killed it.
local function charge_of_loss(shard, job)
  local suspects = key_of(shard, 'suspects', job.worker)
  if is_solo(job) then
    return SUSPECT_CHARGE
  end
  if redis.call('EXISTS', suspects) == 0 then
    return BYSTANDER_CHARGE
  end
  -- The other leases of the worker lapse within this time, and are judged by the same suspects.
  redis.call('PEXPIRE', suspects, job.lease_ms)
  return redis.call('SISMEMBER', suspects, job.id) == 1 and SUSPECT_CHARGE or 0
end

-- The job has failed and is kept for a person to look at; its prompt is refused for a while.
local function bury(shard, job)
  local job_key = key_of(shard, 'job', job.id)
  redis.call('HDEL', job_key, 'fence')
  end_job(shard, job, 'failed', notice_of(job.id))
  redis.call('PEXPIRE', job_key, DEAD_TTL_MS)
  redis.call('PEXPIRE', key_of(shard, 'log', job.id), DEAD_TTL_MS)
  redis.call('ZADD', key_of(shard, 'dead'), shard.now_ms, job.id)
  redis.call('SET', job.poison_key, job.id, 'PX', POISON_TTL_MS)
end

-- The job's worker is lost. Whether the job waits for another one now.
local function survive_loss(shard, job)
  local job_key = key_of(shard, 'job', job.id)
  redis.call('HINCRBY', job_key, 'lost_leases', 1)
  if redis.call('HINCRBY', job_key, 'charge', charge_of_loss(shard, job)) >= DEAD_CHARGE then
    bury(shard, job)
    return false
  end
  requeue(shard, job)
  return true
end

-- Whoever sweeps uses this version of the library.
local function announce_version(shard)
  local versions = key_of(shard, 'versions')
  redis.call('ZADD', versions, shard.now_ms, VERSION)
  redis.call('ZREMRANGEBYSCORE', versions, '-inf', shard.now_ms - VERSION_TTL_MS)
  redis.call('PEXPIRE', versions, VERSION_TTL_MS)
end

-- Ends, in this state, the jobs whose time in an index is up. Returns how many, and how many entries were looked at.
local function end_due(shard, kind, state, limit)
  local index = key_of(shard, kind)
  local due = redis.call('ZRANGEBYSCORE', index, '-inf', shard.now_ms, 'LIMIT', 0, limit)
  local ended = 0
  for _, id in ipairs(due) do
    local job = get_job(shard, id, QUEUE_FIELDS)
    if job.state and not is_final(job.state) then
      end_job(shard, job, state, notice_of(id))
      ended = ended + 1
    else
      redis.call('ZREM', index, id)
    end
  end
  return ended, #due
end

-- ARGV  1 stall_ms: a longer pause between sweeps means that nobody could renew a lease
--       2 most jobs to look at in each index
-- Returns {requeued, expired, poisoned, leases extended by amnesty, abandoned, 1 if there is more to do else 0}.
local function sweep(keys, args)
  local shard = open_shard(keys)
  local stall_ms, limit = tonumber(args[1]), tonumber(args[2])
  local leases, counters = key_of(shard, 'leases'), key_of(shard, 'counters')
  local requeued, poisoned, amnestied = 0, 0, 0

  local swept_ms = tonumber(redis.call('HGET', counters, 'swept_ms'))
  redis.call('HSET', counters, 'swept_ms', shard.now_ms)
  -- A clock that was set back looks like a sweep in the future; leases would last until that time comes again.
  if is_another_run(shard) or swept_ms and math.abs(shard.now_ms - swept_ms) > stall_ms then
    amnestied = grant_amnesty(shard)
  end
  cap_leases(shard, limit)

  local expired, num_overdue = end_due(shard, 'deadlines', 'expired', limit)
  local abandoned, num_unwatched = end_due(shard, 'watched', 'cancelled', limit)

  local lost = redis.call('ZRANGEBYSCORE', leases, '-inf', shard.now_ms, 'LIMIT', 0, limit)
  for _, id in ipairs(lost) do
    local job = get_job(shard, id, LOSS_FIELDS)
    if job.state ~= 'running' then
      redis.call('ZREM', leases, id)
    elseif survive_loss(shard, job) then
      requeued = requeued + 1
    else
      poisoned = poisoned + 1
    end
  end

  redis.call('ZREMRANGEBYSCORE', key_of(shard, 'dead'), '-inf', shard.now_ms - DEAD_TTL_MS)
  announce_version(shard)
  send_news(shard)
  local is_cut_off = num_overdue == limit or num_unwatched == limit or #lost == limit
  return { requeued, expired, poisoned, amnestied, abandoned, is_cut_off and 1 or 0 }
end

-- Whether something was amiss, and is right now: a job in an index it does not belong in, or missing from one it does.
local function repair(shard, id)
  local job_key = key_of(shard, 'job', id)
  local job = get_job(shard, id, INDEX_FIELDS)
  if not job.state then
    return false
  end
  local leases, deadlines, watched = key_of(shard, 'leases'), key_of(shard, 'deadlines'), key_of(shard, 'watched')
  local is_waiting, is_running = job.state == 'waiting', job.state == 'running'
  local ends = is_final(job.state)
  local repaired = false

  if (redis.call('ZSCORE', key_of(shard, 'waiting', job.model), id) ~= false) ~= is_waiting then
    repaired = true
    if is_waiting then
      enter_waiting(shard, job, job.place)
    else
      leave_waiting(shard, job)
    end
  end
  if is_running then -- Libraries of older releases leave `running` as it is, so what it lacks is no defect.
    enter_running(shard, job)
  else
    leave_running(shard, job)
  end
  if (redis.call('ZSCORE', leases, id) ~= false) ~= is_running then
    repaired = true
    if is_running then
      set_lease(shard, id, job.lease_ms)
    else
      redis.call('ZREM', leases, id)
    end
  end
  if (redis.call('ZSCORE', deadlines, id) ~= false) ~= (job.deadline_ms ~= false and not ends) then
    repaired = true
    if job.deadline_ms and not ends then
      redis.call('ZADD', deadlines, job.deadline_ms, id)
    else
      redis.call('ZREM', deadlines, id)
    end
  end
  local must_be_watched = job.grace_ms ~= false and not ends
  if (redis.call('ZSCORE', watched, id) ~= false) ~= must_be_watched then
    repaired = true
    if must_be_watched then
      redis.call('ZADD', watched, shard.now_ms + WATCH_TTL_MS + job.grace_ms, id)
    else
      redis.call('ZREM', watched, id)
    end
  end
  if (redis.call('PTTL', job_key) >= 0) ~= ends then
    repaired = true
    for _, key in ipairs({ job_key, key_of(shard, 'log', id) }) do
      if ends then
        redis.call('PEXPIRE', key, job.retention_ms)
      else
        redis.call('PERSIST', key)
      end
    end
  end
  return repaired
end

-- Calls `drop` for ids without a job in an index, from where the last walk over it stopped. Returns how many there were.
local function drop_orphans(shard, index, num_keys, drop)
  local counters, cursor_name = key_of(shard, 'counters'), 'cursor:' .. index
  local cursor = redis.call('HGET', counters, cursor_name) or '0'
  local next_cursor, members = unpack(redis.call('ZSCAN', shard.root .. ':' .. index, cursor, 'COUNT', num_keys))
  if next_cursor == '0' then
    redis.call('HDEL', counters, cursor_name)
  else
    redis.call('HSET', counters, cursor_name, next_cursor)
  end
  local dropped = 0
  for place = 1, #members, 2 do
    if redis.call('EXISTS', key_of(shard, 'job', members[place])) == 0 then
      dropped = dropped + drop(members[place])
    end
  end
  return dropped
end

-- Counts anew what waits, if a job was lost and with it what it counted for.
local function recount_waiting(shard, models)
  if redis.call('HDEL', key_of(shard, 'counters'), 'must_recount') == 0 then
    return
  end
  for _, counts in ipairs({ 'waiting_tokens', 'tenant_jobs', 'tenant_tokens', 'tenant_weights' }) do
    redis.call('DEL', key_of(shard, counts))
  end
  for _, model in ipairs(models) do
    redis.call('DEL', key_of(shard, 'tenants', model))
    for _, id in ipairs(redis.call('ZRANGE', key_of(shard, 'waiting', model), 0, -1)) do
      local job = get_job(shard, id, INDEX_FIELDS)
      if job.state then
        count_waiting(shard, job, 1)
      end
    end
  end
end

-- One stretch of a slow walk that goes round and round over all jobs and all indexes, shared by all who call this.
--
-- ARGV  1 most keys to look at, roughly   2 pause_ms that must have passed since anybody's last stretch
-- Returns {jobs looked at, repairs}. In a queue that nobody else writes to there is never anything to repair.
local function reconcile(keys, args)
  local shard = open_shard(keys)
  local num_keys, counters = tonumber(args[1]), key_of(shard, 'counters')
  local walked_ms = tonumber(redis.call('HGET', counters, 'walked_ms'))
  if walked_ms and walked_ms <= shard.now_ms and shard.now_ms - walked_ms < tonumber(args[2]) then
    return { 0, 0 }
  end

  local prefix = key_of(shard, 'job', '')
  local cursor = redis.call('HGET', counters, 'cursor') or '0'
  local next_cursor, found = unpack(redis.call('SCAN', cursor, 'MATCH', prefix .. '*', 'COUNT', num_keys))
  redis.call('HSET', counters, 'walked_ms', shard.now_ms, 'cursor', next_cursor)
  local repairs = 0
  for _, key in ipairs(found) do
    if repair(shard, string.sub(key, #prefix + 1)) then
      repairs = repairs + 1
    end
  end

  local models = redis.call('HKEYS', key_of(shard, 'waiting_tokens'))
  for _, index in ipairs({ 'leases', 'deadlines', 'watched' }) do
    repairs = repairs + drop_orphans(shard, index, num_keys, function(id)
      return redis.call('ZREM', key_of(shard, index), id)
    end)
  end
  for _, model in ipairs(models) do
    repairs = repairs + drop_orphans(shard, 'waiting:' .. model, num_keys, function(id)
      return drop_waiting(shard, model, id)
    end)
    drop_orphans(shard, 'running:' .. model, num_keys, function(id)
      return redis.call('ZREM', key_of(shard, 'running', model), id)
    end)
  end
  recount_waiting(shard, models)
  return { #found, repairs }
end

------------------------------------------------------------------------------------------------------------------------
-- The operator's side

-- ARGV  1 most jobs
-- Returns {{job id, ms since its death, end position, Job bytes} ...} of dead jobs, the last to die first.
local function dead(keys, args)
  local shard = open_shard(keys)
  local letters = {}
  local died = redis.call('ZRANGE', key_of(shard, 'dead'), 0, args[1] - 1, 'REV', 'WITHSCORES')
  for index = 1, #died, 2 do
    local job = get_job(shard, died[index], { 'job', 'end_position' })
    if job.job then
      letters[#letters + 1] = { job.id, shard.now_ms - died[index + 1], tonumber(job.end_position), job.job }
    end
  end
  return letters
end

-- ARGV  1 job id
-- Returns 1 if the job was dead and waits again, with nothing charged, no deadline, and no need to be watched; else 0.
-- This is the one way out of a final state, and only a person takes it.
local function revive(keys, args)
  local shard = open_shard(keys)
  local job = get_job(shard, args[1], LOSS_FIELDS)
  if redis.call('ZREM', key_of(shard, 'dead'), args[1]) == 0 or not job.state then
    return 0
  end
  local job_key = key_of(shard, 'job', job.id)
  redis.call('PERSIST', job_key)
  redis.call('PERSIST', key_of(shard, 'log', job.id))
  redis.call('DEL', job.poison_key)
  redis.call('HDEL', job_key, 'charge', 'lost_leases', 'deadline_ms', 'grace_ms')
  requeue(shard, job)
  return 1
end

------------------------------------------------------------------------------------------------------------------------

-- `allow-oom`: when memory is full, no new job comes in, and those that are in go on to their end.
local function register(name, callback, flags)
  redis.register_function{ function_name = 'oasst_' .. name .. '_' .. VERSION, callback = callback, flags = flags }
end

register('spreading', spreading, { 'no-writes' })
register('spread', spread, { 'allow-oom' })
register('enqueue', enqueue, {})
register('attach', attach, { 'allow-oom' })
register('status', status, { 'no-writes' })
register('keep_watching', keep_watching, { 'allow-oom' })
register('unwatch', unwatch, { 'allow-oom' })
register('read', read, { 'no-writes' })
register('cancel', cancel, { 'allow-oom' })
register('load', load, { 'no-writes' })
register('claim', claim, { 'allow-oom' })
register('push', push, { 'allow-oom' })
register('release', release, { 'allow-oom' })
register('heartbeat', heartbeat, { 'allow-oom' })
register('sweep', sweep, { 'allow-oom' })
register('reconcile', reconcile, { 'allow-oom' })
register('dead', dead, { 'no-writes' })
register('revive', revive, { 'allow-oom' })
