// Asking the server. Every address is relative: the token is part of the page's own.

async function answered(response) {
  if (response.ok) return response;
  let said = response.statusText;
  try {
    said = (await response.json()).problem;
  } catch {
    // no JSON: the status says it
  }
  throw new Error(said);
}

async function asked(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the viewer does not answer; was it stopped?");
  }
  return answered(response);
}

export const getJson = async (path, signal) => (await asked(path, { signal })).json();
export const getBytes = async (path, signal) => (await asked(path, { signal })).arrayBuffer();

export async function post(path, content) {
  const headers = { "Content-Type": "application/json" };
  return (await asked(path, { method: "POST", headers, body: JSON.stringify(content) })).json();
}
