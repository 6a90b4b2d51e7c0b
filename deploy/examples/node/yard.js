'use strict';
// A client of docs/wire.md on node's own sockets: submit, stream, result. No package is needed.

const { randomUUID } = require('node:crypto');
const net = require('node:net');
const { setTimeout: sleep } = require('node:timers/promises');

const FINAL = new Set(['done', 'error', 'cancelled']);
const PASSING = /^(LOADING|READONLY|MASTERDOWN|OOM|BUSY|MISCONF)\b/; // what a Redis says that will serve again
const SILENCE_MS = 5000; // after so long without an event, the job is sent again under its id
const PAUSE_MS = 200;

// One value of a Redis reply that begins at byte `at`: [value, end], or null when it has not wholly arrived.
function parse(bytes, at) {
  const end = bytes.indexOf('\r\n', at);
  if (end < 0) return null;
  const kind = String.fromCharCode(bytes[at]);
  const line = bytes.toString('utf8', at + 1, end);
  const after = end + 2;
  if (kind === '+') return [line, after];
  if (kind === '-') return [new Error(line), after];
  if (kind === ':') return [Number(line), after];
  const size = Number(line);
  if (size < 0) return [null, after];
  if (kind === '$') return bytes.length < after + size + 2 ? null : [bytes.toString('utf8', after, after + size), after + size + 2];
  if (kind !== '*') throw new Error(`not a Redis server: ${line}`);
  const items = [];
  let next = after;
  for (let i = 0; i < size; i++) {
    const item = parse(bytes, next);
    if (item === null) return null;
    items.push(item[0]);
    next = item[1];
  }
  return [items, next];
}

// One connection. Commands are answered in their order; a lost connection rejects those that wait.
class Connection {
  constructor(url) {
    const { hostname, port, username, password, pathname } = new URL(url);
    this.waiting = [];
    this.bytes = Buffer.alloc(0);
    this.socket = net.connect({ host: hostname || '127.0.0.1', port: Number(port || 6379), noDelay: true });
    this.socket.on('data', (bytes) => this.take(bytes));
    this.socket.on('error', () => {}); // `close` follows
    this.socket.on('close', () => this.lose());
    this.opened = password ? [this.command('AUTH', ...[username, password].filter(Boolean).map(decodeURIComponent))] : [];
    if (pathname.length > 1) this.opened.push(this.command('SELECT', pathname.slice(1)));
    this.opened = Promise.all(this.opened);
    this.opened.catch(() => {}); // told to whoever waits for it
  }

  command(...words) {
    return new Promise((resolve, reject) => {
      if (this.lost) return reject(this.lost);
      this.waiting.push({ resolve, reject });
      const parts = words.map(String).map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`);
      this.socket.write(`*${parts.length}\r\n${parts.join('')}`);
    });
  }

  take(bytes) {
    this.bytes = Buffer.concat([this.bytes, bytes]);
    for (let reply; this.bytes.length && (reply = parse(this.bytes, 0)); this.bytes = this.bytes.subarray(reply[1])) {
      const { resolve, reject } = this.waiting.shift();
      if (reply[0] instanceof Error) reject(Object.assign(reply[0], { passing: PASSING.test(reply[0].message) }));
      else resolve(reply[0]);
    }
  }

  lose() {
    this.lost = Object.assign(new Error('the connection to Redis was lost'), { passing: true });
    for (const { reject } of this.waiting.splice(0)) reject(this.lost);
  }
}

// One job at a time: a blocking read holds the connection. Use several for several jobs.
class Yard {
  constructor(url, prefix = 'yard:') {
    this.url = url;
    this.prefix = prefix;
  }

  // The answer to a command, over a new connection if the last was lost.
  async command(...words) {
    if (!this.connection || this.connection.lost) this.connection = new Connection(this.url);
    await this.connection.opened;
    return this.connection.command(...words);
  }

  // Send a job, an object with the fields of the contract; returns its id.
  async submit(fields) {
    const job = { id: randomUUID(), ...fields };
    await this.command('XADD', `${this.prefix}in`, '*', ...Object.entries(job).flat());
    return job.id;
  }

  // Send a job and give its events, the final one last. The id makes it safe to send it again, so a Redis that
  // restarts, even without its last second, costs nothing but time.
  async *stream(fields) {
    const job = { id: randomUUID(), stream: 1, ...fields };
    for (let last = '0', done = false; !done; ) {
      try {
        await this.submit(job);
        for (let entries; !done && (entries = await this.read(job.id, last)); ) {
          for (const [entry, pairs] of entries) {
            const event = {};
            for (let i = 0; i < pairs.length; i += 2) event[pairs[i]] = pairs[i + 1];
            last = entry;
            done = FINAL.has(event.ev);
            yield event;
          }
        }
      } catch (error) {
        if (!error.passing) throw error;
        await sleep(PAUSE_MS);
      }
    }
  }

  // Send a job and wait for its final event.
  async result(fields) {
    let final;
    for await (final of this.stream({ ...fields, stream: 0 }));
    return final;
  }

  // New entries of a job's answer, waiting for them; null after a long silence.
  async read(id, last) {
    const reply = await this.command('XREAD', 'BLOCK', SILENCE_MS, 'STREAMS', `${this.prefix}out:${id}`, last);
    return reply && reply[0][1];
  }

  close() {
    if (this.connection) this.connection.socket.destroy();
  }
}

module.exports = { Yard };
