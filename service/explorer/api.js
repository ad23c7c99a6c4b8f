// The service's API, as the page needs it; every answer is of the tokenizer and the namespace that are looked at.

/** What the page looks at; `changed` is told to all who ask, and `assigned` when the page itself has assigned an ID there. */
export const scope = Object.assign(new EventTarget(), { tokenizer: null, namespace: "default", manifest: null });

export class Problem extends Error {
  constructor({ title, detail, status = 0, ...members }) {
    super(`${title}: ${detail}`);
    Object.assign(this, { title, detail, status, members });
  }
}

const KEY = "semid-api-key"; // for this tab alone, until it is closed

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/**
 * Call the service.
 * @returns {Promise<any>} what it answered, parsed
 * @throws {Problem} what it refused, or that it did not answer
 */
export async function call(path, { body, query = {}, signal } = {}) {
  const url = new URL(path, document.baseURI);
  for (const [name, value] of Object.entries(query)) if (value !== null && value !== undefined) url.searchParams.set(name, value);
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(key ? { authorization: `Bearer ${key}` } : {}), ...(body ? { "content-type": "application/json" } : {}) };
  let response;
  try {
    response = await fetch(url, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem({ title: "The service did not answer.", detail: "Is it running, and can this browser reach it?" });
  }
  const answer = await response.json().catch((error) => {
    if (error.name === "AbortError") throw error;
    if (response.ok) throw new Problem({ title: "The answer cannot be read.", detail: "It may have ended early: try again." });
    return { title: "The answer cannot be read", detail: response.statusText };
  });
  if (response.ok) return answer;
  if (response.status === 401 || response.status === 403) scope.dispatchEvent(new Event("key-wanted"));
  if (response.status === 401) throw keyWanted(key, answer);
  const wait = response.headers.get("retry-after");
  const detail = wait ? `${answer.detail} (try again in ${wait} s)` : answer.detail;
  throw new Problem({ ...answer, title: `${answer.title}.`, detail, status: response.status });
}

/** What the service says to programs of a key, to people. */
const keyWanted = (key, answer) => new Problem({
  ...answer,
  title: key ? "The service does not take this key." : "The service asks for a key.",
  detail: key ? "It may have expired or been removed: use another." : "One with the scope read is enough to look; to assign takes tokenize.",
  status: 401,
});

/** Where a request says what it looks at: in its query, or in its body. */
const named = () => ({ tokenizer: scope.tokenizer, namespace: scope.namespace });

export const tokenizers = () => call("tokenizers");
export const explain = (item, signal) => call("explain", { body: { item, neighbours: 12, ...named() }, signal });
export const assign = (item) => call("tokenize", { body: { items: [item], ...named() } });
export const prefix = (text, { limit = 1, cursor = null, signal } = {}) =>
  call(`prefix/${encodeURIComponent(text)}`, { query: { limit, cursor, ...named() }, signal });
export const stats = (signal) => call("stats", { query: { codewords: true, ...named() }, signal });
export const lookUp = (semanticId) => call("lookup", { body: { semantic_ids: [semanticId], ...named() } });
export const assignment = (itemId) => call("assignment", { query: { item_id: itemId, ...named() } });
export const changes = (after, { epoch = null, limit = 50, wait = 0, signal } = {}) =>
  call("changes", { query: { after, epoch, limit, wait_s: wait, display: true, ...named() }, signal });
