// Files of the built page: fetched once, with progress, kept in the browser's cache, unpacked.

const KEEP = "dte-playground-";

/**
 * Fetch and unpack files ({name: {file, bytes}}) -> {name: Uint8Array}; progress: called with
 * bytes done and bytes in all. version: of the build; files of other builds are forgotten.
 */
export async function loadFiles(base, files, version, progress) {
  const total = Object.values(files).reduce((sum, f) => sum + f.bytes, 0);
  const cache = await openCache(version);
  let done = 0;
  const tick = (n) => progress((done += n), total);
  const loaded = await Promise.all(Object.entries(files).map(async ([name, { file, bytes }]) => {
    const data = await fetchFile(new URL(file, base).href, bytes, cache, tick);
    return [name, file.endsWith(".gz") ? await unzip(data) : data];
  }));
  return Object.fromEntries(loaded);
}

async function openCache(version) {  // none where the browser forbids it: then nothing is kept
  try {
    for (const name of await caches.keys()) {
      if (name.startsWith(KEEP) && name !== KEEP + version) await caches.delete(name);
    }
    return await caches.open(KEEP + version);
  } catch {
    return null;
  }
}

async function fetchFile(url, bytes, cache, tick) {
  const kept = await cache?.match(url);
  if (kept) {
    const data = new Uint8Array(await kept.arrayBuffer());
    if (data.length === bytes) {
      tick(bytes);
      return data;
    }
  }
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} could not be loaded (${answer.status}): reload the page.`);
  const data = new Uint8Array(bytes), reader = answer.body.getReader();
  let at = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > bytes) break;
    data.set(value, at);
    at += value.length;
    tick(value.length);
  }
  if (at !== bytes) throw new Error(`${url} is not whole: reload the page.`);
  try {
    await cache?.put(url, new Response(data));
  } catch { /* no room: it is fetched again next time */ }
  return data;
}

async function unzip(data) {
  const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The first `halfBytes` are low bytes, then high bytes, of 16-bit numbers: put them in pairs. */
export function joinPlanes(data, halfBytes) {
  const joined = new Uint8Array(data), n = halfBytes / 2;
  for (let i = 0; i < n; i++) {
    joined[2 * i] = data[i];
    joined[2 * i + 1] = data[n + i];
  }
  return joined;
}
