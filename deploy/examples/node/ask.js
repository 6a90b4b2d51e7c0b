'use strict';
// node ask.js PROMPT [ADAPTERS] [MAX_TOKENS]: prints the answer as it is made. LORAYARD_REDIS_URL says where the yard is.

const { Yard } = require('./yard.js');

async function main([prompt, adapter = '', maxTokens = 64]) {
  if (!prompt) throw new Error('name a prompt: node ask.js PROMPT [ADAPTERS] [MAX_TOKENS]');
  const yard = new Yard(process.env.LORAYARD_REDIS_URL || 'redis://127.0.0.1:6379/0');
  try {
    for await (const event of yard.stream({ prompt, adapter, max_tokens: maxTokens, temperature: 0 })) {
      if (event.ev === 'tok') process.stdout.write(event.text);
      else if (event.ev === 'restart') process.stdout.write('\n(the worker was lost; the answer begins again)\n');
      else if (event.ev === 'done') process.stdout.write(`\n(${event.new_tokens} tokens, ${event.finish})\n`);
      else throw new Error(`${event.code || event.ev}: ${event.error || 'somebody cancelled the job'}`);
    }
  } finally {
    yard.close();
  }
}

main(process.argv.slice(2)).catch((error) => {
  process.stderr.write(`ask: ${error.message}\n`);
  process.exitCode = 1;
});
