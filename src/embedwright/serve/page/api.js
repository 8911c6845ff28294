// Asks the server. The key that a person types stays in this module's memory.
let key = "";
export const useKey = (typed) => { key = typed; };

class Refused extends Error {
  // `wait` is the number of seconds after which the server wants to be asked again; 0 if asking again is no use.
  constructor(status, message, wait = 0) {
    super(message);
    Object.assign(this, { status, wait });
  }
}

export async function ask(path, body = null, signal = null) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(body && { "Content-Type": "application/json" }) };
  const how = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  let answer, said;
  try {
    answer = await fetch(path, how);
    said = await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(answer?.status ?? 0, answer ? `The server answered ${answer.status} without JSON.` : "The server does not answer. Is it still running?");
  }
  if (answer.ok) return said;
  const wait = [429, 503].includes(answer.status) ? Number(answer.headers.get("Retry-After")) || 2 : 0;
  throw new Refused(answer.status, said.error?.message ?? `The server answered ${answer.status}.`, wait);
}
