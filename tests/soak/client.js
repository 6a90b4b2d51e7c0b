'use strict';
// node client.js YARD_JS URL: jobs come in as JSON lines, final events go out as JSON lines. Many jobs at a time.

const { createInterface } = require('node:readline');

const [, , module_, url] = process.argv;
const { Yard } = require(module_);
const AT_ONCE = 24;

async function work(jobs) {
  const yard = new Yard(url);
  for (let job; (job = jobs.shift()); ) {
    process.stdout.write(`${JSON.stringify({ ...(await yard.result(job)), id: job.id })}\n`);
  }
  yard.close();
}

async function main() {
  const jobs = [];
  for await (const line of createInterface({ input: process.stdin })) jobs.push(JSON.parse(line));
  await Promise.all(Array.from({ length: AT_ONCE }, () => work(jobs)));
}

main();
